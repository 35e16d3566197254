package dev.lfmc.demo

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json

/** What `manifest.json` of every bundle says, as far as an app needs it. */
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

/** What the manifest of an ExecuTorch bundle says besides. */
@Serializable
data class ExecuTorchFacts(val chunk: Int)

/** A prompt and how lfmc continued it, token by token, on the machine that exported the bundle. */
@Serializable
data class Golden(
    val text: String,
    val prompt: List<Int>,
    val tokens: List<Int>,
    val margin: Float,
)

/** What is wrong, in words for the screen. */
class BundleException(message: String) : Exception(message)

/** Files have more than an app needs. */
val JSON = Json { ignoreUnknownKeys = true }
