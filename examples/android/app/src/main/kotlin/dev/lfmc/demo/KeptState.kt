package dev.lfmc.demo

import java.nio.FloatBuffer

/**
 * The state of a layer, which graphs read as it was before the call: a filter's last inputs
 * `[1, H, taps - 1]`, keys `[K, D, C]`, or values `[K, C, D]`.
 */
class KeptState(told: QualcommFacts.State) {
    val name = "${told.kind}_${told.layer}"

    private val isFilter = told.kind == "conv"
    private val isValue = told.kind == "value"
    private val sizes = if (isFilter) told.shape else cache(told.shape)

    val shape = LongArray(sizes.size) { sizes[it].toLong() }
    val values = floats(shape)

    private val slots = sizes[if (isValue) 1 else 2] // per row
    private val width = if (isValue) sizes[2] else 1 // per slot
    private val rows = values.capacity() / (slots * width)

    init {
        if (told.kind !in listOf("conv", "key", "value")) {
            throw BundleException("The app knows no states of the kind ${told.kind}.")
        }
    }

    fun reset() {
        for (at in 0 until values.capacity()) values.put(at, 0f)
    }

    /** Appends the first `count` of the `tokens` tokens of a call that starts at position `start`. */
    fun add(made: FloatBuffer, tokens: Int, start: Int, count: Int) {
        for (row in 0 until rows) {
            val from = row * tokens * width
            if (isFilter) shift(made, from, row * slots, count)
            else {
                val to = (row * slots + start) * width
                for (at in 0 until count * width) values.put(to + at, made.get(from + at))
            }
        }
    }

    /** Shifts a row by `count` new values, so that it contains the last inputs. */
    private fun shift(made: FloatBuffer, from: Int, to: Int, count: Int) {
        for (slot in 0 until slots) {
            val next = slot + count
            val isHeld = next < slots
            values.put(to + slot, if (isHeld) values.get(to + next) else made.get(from + next - slots))
        }
    }

    /** Reorders a cache's shape `[1, K, C, D]` to that of the graphs. */
    private fun cache(shape: List<Int>): List<Int> {
        val (_, heads, context, dim) = shape
        return if (isValue) listOf(heads, context, dim) else listOf(heads, dim, context)
    }
}
