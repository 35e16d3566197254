package dev.lfmc.demo

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable

private val STAGES = listOf("context", "edge")

/** What the manifest of a Qualcomm bundle says besides: its graphs, and what a host does. */
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
    /** Shapes, and the steps of each kind of attention layer's angles. */
    @Serializable
    data class Interface(
        @SerialName("hidden_size") val hiddenSize: Int,
        val context: Int,
        val rotary: Map<String, List<Float>>,
        val states: List<State>,
    )

    /** A cache's `shape` is `[1, K, C, D]`, a filter's inputs are `[1, H, taps - 1]`. */
    @Serializable
    data class State(
        val kind: String,
        val layer: Int,
        val shape: List<Int>,
        val window: Int?,
    )

    /** Compiled for a chip; else the device's ONNX Runtime compiles. */
    val isCompiled: Boolean get() = stage == "context"

    /** The file of the graph for calls of so many tokens. */
    fun graph(tokens: Int): String =
        (if (tokens == 1) "decode" else "prefill") + if (isCompiled) ".onnx" else ".qdq.onnx"

    /** Throws where the app, or this `chip`, can't run the bundle. */
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

/** Files of a bundle that nothing on a phone opens: what compiled graphs were compiled from. */
fun needless(manifest: String): Set<String> {
    val told = JSON.decodeFromString<Manifest>(manifest)
    if (told.target != "qualcomm") return emptySet()
    if (!JSON.decodeFromString<QualcommFacts>(manifest).isCompiled) return emptySet()
    return told.files.keys.filter { it == "params.safetensors" || it.endsWith(".qdq.onnx") }.toSet()
}
