package dev.lfmc.demo

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable

private val STAGES = listOf("context", "edge")

/** The additional part of the manifest for a Qualcomm bundle: its graphs and its host. */
@Serializable
data class QualcommFacts(
    val runtime: String,
    val stage: String,
    val soc: String,
    val activations: String,
    val lengths: List<Int>,
    @SerialName("interface") val shape: Interface,
    val embedding: String,
    @SerialName("embedding_bits") val embeddingBits: Int,
) {
    /** Shapes, and the rotary frequencies of each kind of attention layer. */
    @Serializable
    data class Interface(
        @SerialName("hidden_size") val hiddenSize: Int,
        val context: Int,
        val rotary: Map<String, List<Float>>,
        val states: List<State>,
    )

    /** A state: the shape of a cache is `[1, K, C, D]`, that of a filter `[1, H, taps - 1]`. */
    @Serializable
    data class State(
        val kind: String,
        val layer: Int,
        val shape: List<Int>,
        val window: Int?,
    )

    /** Whether the graphs are compiled for a chip; else ONNX Runtime compiles them on the device. */
    val isCompiled: Boolean get() = stage == "context"

    /** Returns the file name of the graph for calls of this many tokens. */
    fun graph(tokens: Int): String =
        (if (tokens == 1) "decode" else "prefill") + if (isCompiled) ".onnx" else ".qdq.onnx"

    /** Throws if the app or this `chip` can't run the bundle. */
    fun requireRunnable(chip: String) {
        if (runtime != "onnxruntime") {
            val todo = "export with -O runtime=onnxruntime"
            throw BundleException("The bundle is for the runtime $runtime, which this app lacks: $todo.")
        }
        if (stage !in STAGES) throw BundleException("The bundle's stage is $stage, not one of $STAGES.")
        if (isCompiled && !chip.startsWith(soc, ignoreCase = true)) {
            val todo = "export with --soc of this chip, or with -O stage=edge"
            throw BundleException("The bundle is compiled for $soc, and this is $chip: $todo.")
        }
    }
}

/** Returns the files that the phone never opens: the sources of compiled graphs. */
fun needless(manifest: String): Set<String> {
    val told = JSON.decodeFromString<Manifest>(manifest)
    if (told.target != "qualcomm") return emptySet()
    if (!JSON.decodeFromString<QualcommFacts>(manifest).isCompiled) return emptySet()
    return told.files.keys.filter { it == "params.safetensors" || it.endsWith(".qdq.onnx") }.toSet()
}
