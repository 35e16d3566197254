package dev.lfmc.demo

import java.io.Closeable

/** Tokens in, scores out: one conversation. For one thread at a time. */
interface LanguageModel : Closeable {
    /** The next token begins a conversation. */
    fun reset()

    /** Scores of every word of the vocabulary to follow these tokens. */
    fun step(tokens: List<Int>): FloatArray
}

/** Throws where a conversation of `length` tokens can't go on with these. */
fun Manifest.requireTokens(tokens: List<Int>, length: Int) {
    if (tokens.isEmpty()) throw BundleException("A step needs at least one token.")
    if (tokens.any { it !in 0 until model.vocabSize }) {
        throw BundleException("A token is outside of the vocabulary.")
    }
    if (length + tokens.size > context) {
        throw BundleException("The conversation is longer than $context tokens.")
    }
}

/** The first of the largest. */
fun likeliest(scores: FloatArray): Int {
    var best = 0
    for (token in scores.indices) {
        if (scores[token] > scores[best]) best = token
    }
    return best
}
