package dev.lfmc.demo

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json

/** The part of `manifest.json` that an app needs, for bundles of all targets. */
@Serializable
data class Manifest(
    val target: String,
    val artifact: List<String>,
    val context: Int,
    val model: Model,
    val tokens: Tokens,
    @SerialName("chat_prompt") val chatPrompt: String?,
    val files: Map<String, Stored>,
) {
    @Serializable
    data class Model(
        val name: String,
        @SerialName("vocab_size") val vocabSize: Int,
    )

    @Serializable
    data class Tokens(val bos: Int?, val stop: List<Int>)

    @Serializable
    data class Stored(val nbytes: Long)
}

/** The additional part for an ExecuTorch bundle. */
@Serializable
data class ExecuTorchFacts(val chunk: Int)

/** A prompt, and the tokens that lfmc generated on the machine that exported the bundle. */
@Serializable
data class Golden(
    val text: String,
    val prompt: List<Int>,
    val tokens: List<Int>,
    val margin: Float,
)

/** An error with a message for the screen. */
class BundleException(message: String) : Exception(message)

/** Ignores the keys that the app does not need. */
val JSON = Json { ignoreUnknownKeys = true }
