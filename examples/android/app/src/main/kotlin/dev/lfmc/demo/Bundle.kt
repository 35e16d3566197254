package dev.lfmc.demo

import android.content.Context
import java.io.File
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json

/** What `manifest.json` of a bundle says, as far as an app needs it. */
@Serializable
data class Manifest(
    val target: String,
    val artifact: List<String>,
    val context: Int,
    val chunk: Int,
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

/** A prompt and how lfmc continued it, token by token, on the machine that exported the bundle. */
@Serializable
data class Golden(
    val text: String,
    val prompt: List<Int>,
    val tokens: List<Int>,
    val margin: Float,
)

class BundleException(message: String) : Exception(message)

/** The folder that `lfmc export --target executorch` wrote, as files that the runtime can map. */
class Bundle private constructor(private val folder: File, val manifest: Manifest) {
    val program: String get() = File(folder, manifest.artifact.single()).path
    val tokenizer: String get() = File(folder, "tokenizer.json").path

    fun golden(): List<Golden> = JSON.decodeFromString(File(folder, "golden.json").readText())

    companion object {
        private const val ASSETS = "bundle"
        private val JSON = Json { ignoreUnknownKeys = true }

        /**
         * Copies the bundle out of the app's assets, where that has not been done yet. Takes a while at
         * the first start: call it on a background thread.
         */
        fun unpack(context: Context): Bundle {
            val assets = context.assets
            if ("manifest.json" !in assets.list(ASSETS).orEmpty()) {
                throw BundleException("The app has no bundle: see README.md.")
            }
            val text = assets.open("$ASSETS/manifest.json").bufferedReader().use { it.readText() }
            val manifest = JSON.decodeFromString<Manifest>(text)
            if (manifest.target != "executorch") {
                throw BundleException("The bundle is for ${manifest.target}, not for ExecuTorch.")
            }
            val folder = File(context.filesDir, ASSETS)
            val stamp = File(folder, "manifest.json")
            if (!stamp.exists() || stamp.readText() != text) {
                folder.deleteRecursively()
                folder.mkdirs()
                for ((name, stored) in manifest.files) {
                    val file = File(folder, name)
                    assets.open("$ASSETS/$name").use { from -> file.outputStream().use(from::copyTo) }
                    if (file.length() != stored.nbytes) {
                        throw BundleException("$name has ${file.length()} bytes, not ${stored.nbytes}.")
                    }
                }
                stamp.writeText(text)
            }
            return Bundle(folder, manifest)
        }
    }
}
