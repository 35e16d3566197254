package dev.lfmc.demo

import java.io.Closeable
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/**
 * Tokens in, scores out. The program keeps the conversation; it forgets it when a call begins at
 * position 0. For one thread at a time.
 */
class LanguageModel(private val bundle: Bundle) : Closeable {
    private val module = Module.load(bundle.program, Module.LOAD_MODE_MMAP)
    private var length = 0

    /** The next token begins a conversation. */
    fun reset() {
        length = 0
    }

    /** Scores of every word of the vocabulary to follow these tokens. */
    fun step(tokens: List<Int>): FloatArray {
        val manifest = bundle.manifest
        require(tokens.isNotEmpty()) { "A step needs at least one token." }
        require(tokens.all { it in 0 until manifest.model.vocabSize }) {
            "A token is outside of the vocabulary."
        }
        if (length + tokens.size > manifest.context) {
            throw BundleException("The conversation is longer than ${manifest.context} tokens.")
        }
        var scores = FloatArray(0)
        for (piece in tokens.chunked(manifest.chunk)) {
            val ids = LongArray(piece.size) { piece[it].toLong() }
            val input = Tensor.fromBlob(ids, longArrayOf(1, piece.size.toLong()))
            val position = Tensor.fromBlob(longArrayOf(length.toLong()), longArrayOf(1))
            val output = module.forward(EValue.from(input), EValue.from(position))
            val all = output[0].toTensor().dataAsFloatArray
            scores = all.copyOfRange(all.size - manifest.model.vocabSize, all.size)
            length += piece.size
        }
        return scores
    }

    override fun close() = module.close()
}

/** The first of the largest. */
fun likeliest(scores: FloatArray): Int {
    var best = 0
    for (token in scores.indices) {
        if (scores[token] > scores[best]) best = token
    }
    return best
}
