package dev.lfmc.demo

import kotlin.math.exp
import kotlin.random.Random

/** Generates text with any model: one answer in a new conversation. */
class Writer(private val model: LanguageModel, bundle: Bundle) {
    private val manifest = bundle.manifest
    private val tokenizer = Tokenizer(bundle.file("tokenizer.json"))

    @Volatile private var isStopped = false

    /** Calls `tell` after every token with the answer so far and its number of tokens. */
    fun write(prompt: String, temperature: Float, tell: (String, Int) -> Unit) {
        isStopped = false
        model.reset()
        val asked = tokenizer.encode(prompt)
        val made = mutableListOf<Int>()
        var scores = model.step(asked)
        while (!isStopped && asked.size + made.size < manifest.context) {
            val token = drawn(scores, temperature)
            if (token in manifest.tokens.stop) break
            made += token
            tell(tokenizer.decode(made), made.size)
            scores = model.step(listOf(token))
        }
    }

    fun stop() {
        isStopped = true
    }
}

/** Samples a token by its score over the temperature; at 0, the most likely token. */
fun drawn(scores: FloatArray, temperature: Float): Int {
    val best = likeliest(scores)
    if (temperature == 0f) return best
    val weights = FloatArray(scores.size) { exp((scores[it] - scores[best]) / temperature) }
    var left = Random.nextFloat() * weights.sum()
    return weights.indices.firstOrNull { token ->
        left -= weights[token]
        left <= 0
    } ?: best
}
