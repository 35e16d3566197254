package dev.lfmc.demo

import java.nio.FloatBuffer
import kotlin.math.cos
import kotlin.math.sin

/** The rotary tables and the attention masks, which depend on the positions of tokens. */
class Positions(private val shape: QualcommFacts.Interface) {
    private val steps = shape.rotary.mapValues { it.value.toFloatArray() }
    private val masks =
        shape.states.filter { it.kind == "key" }.map { it.window ?: 0 }.associateBy {
            if (it == 0) "mask" else "mask_$it"
        }

    val names = steps.keys.flatMap { listOf("cos_$it", "sin_$it") } + masks.keys

    /** Writes the tables that the graph has, for `tokens` tokens from position `start` on. */
    fun write(start: Int, tokens: Int, find: (String) -> FloatBuffer?) {
        for ((kind, own) in steps) {
            find("cos_$kind")?.let { writeAngles(start, tokens, own, it, ::cos) }
            find("sin_$kind")?.let { writeAngles(start, tokens, own, it, ::sin) }
        }
        for ((name, window) in masks) find(name)?.let { writeMask(start, tokens, window, it) }
    }

    /** Writes cosines or sines `[T, D / 2]`. */
    private fun writeAngles(
        start: Int,
        tokens: Int,
        steps: FloatArray,
        into: FloatBuffer,
        of: (Float) -> Float,
    ) {
        for (token in 0 until tokens) {
            val position = (start + token).toFloat()
            for (dim in steps.indices) into.put(token * steps.size + dim, of(position * steps[dim]))
        }
    }

    /** Writes a mask `[T, C + T]` of the written slots and the call's tokens that each token sees. */
    private fun writeMask(start: Int, tokens: Int, window: Int, mask: FloatBuffer) {
        val width = shape.context + tokens
        for (token in 0 until tokens) {
            val position = start + token
            for (column in 0 until width) {
                val isSlot = column < shape.context
                val place = if (isSlot) column else start + column - shape.context
                val isThere = if (isSlot) place < start else place <= position
                val isNear = window == 0 || place > position - window
                mask.put(token * width + column, if (isThere && isNear) 0f else MASKED)
            }
        }
    }

    private companion object {
        const val MASKED = -64f
    }
}
