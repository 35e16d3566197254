package dev.lfmc.demo

/** The result of a golden prompt on this device. */
data class Check(val text: String, val passed: Boolean, val detail: String)

/**
 * Continues every golden prompt greedily and compares the tokens, which must all be equal.
 *
 * The margin is the smallest difference of the two best scores over the golden tokens. Different
 * tokens with a large margin mean a fault of the runtime on this device; with a tiny margin they mean
 * another order of arithmetic.
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
