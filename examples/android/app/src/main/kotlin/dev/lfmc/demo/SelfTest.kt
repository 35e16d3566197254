package dev.lfmc.demo

/** A golden prompt on this device. */
data class Check(val text: String, val passed: Boolean, val detail: String)

/**
 * Continues every golden prompt greedily and compares tokens: all have to be equal.
 *
 * The margin is how far apart the two best scores were where they were closest. Other tokens behind a
 * large one mean a fault of the runtime on this device; behind a tiny one, arithmetic in another order.
 */
fun selfTest(model: LanguageModel, prompts: List<Golden>): List<Check> =
    prompts.map { golden ->
        model.reset()
        var scores = model.step(golden.prompt)
        val made = mutableListOf<Int>()
        while (made.size < golden.tokens.size) {
            made += likeliest(scores)
            if (made.size < golden.tokens.size) scores = model.step(listOf(made.last()))
        }
        val same = made.zip(golden.tokens).takeWhile { (ours, theirs) -> ours == theirs }.size
        val equal = made == golden.tokens
        val detail = if (equal) "equal" else "equal up to token $same, margin ${golden.margin}"
        Check(golden.text, equal, detail)
    }
