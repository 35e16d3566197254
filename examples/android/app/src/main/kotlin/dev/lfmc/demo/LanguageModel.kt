package dev.lfmc.demo

import java.io.Closeable

/** One conversation: tokens in, scores out. Not thread-safe. */
interface LanguageModel : Closeable {
    /** Starts a new conversation with the next token. */
    fun reset()

    /** Appends tokens; returns the scores of all tokens of the vocabulary to come next. */
    fun step(tokens: List<Int>): FloatArray
}

/** Throws if these tokens can't continue a conversation of `length` tokens. */
fun Manifest.requireTokens(tokens: List<Int>, length: Int) {
    if (tokens.isEmpty()) throw BundleException("A step needs at least one token.")
    if (tokens.any { it !in 0 until model.vocabSize }) {
        throw BundleException("A token is outside of the vocabulary.")
    }
    if (length + tokens.size > context) {
        throw BundleException("The conversation is longer than $context tokens.")
    }
}

/** Returns the token with the largest score; the first, if several are equal. */
fun likeliest(scores: FloatArray): Int {
    var best = 0
    for (token in scores.indices) {
        if (scores[token] > scores[best]) best = token
    }
    return best
}
