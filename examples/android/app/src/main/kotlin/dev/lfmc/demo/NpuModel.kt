package dev.lfmc.demo

import ai.onnxruntime.OrtSession
import java.io.File

/**
 * The host of a Qualcomm bundle. Graphs of fixed lengths compute the model. The host looks up
 * embeddings, computes rotary tables and masks, and stores the states. `session` opens a graph.
 */
class NpuModel(bundle: Bundle, session: (File) -> OrtSession) : LanguageModel {
    private val manifest = bundle.manifest
    private val facts = JSON.decodeFromString<QualcommFacts>(bundle.json)
    private val embedding = embedding(bundle, facts)
    private val positions = Positions(facts.shape)
    private val states = facts.shape.states.map(::KeptState)
    private val graphs =
        facts.lengths.sorted().associateWith { tokens ->
            Graph(session(bundle.file(facts.graph(tokens))), positions.names + "hidden", states)
        }
    private var length = 0

    override fun reset() {
        length = 0
        states.forEach(KeptState::reset)
    }

    override fun step(tokens: List<Int>): FloatArray {
        manifest.requireTokens(tokens, length)
        return tokens.chunked(graphs.keys.max()).map(::call).last()
    }

    override fun close() = graphs.values.forEach(Graph::close)

    /** Calls the shortest graph that takes these tokens, with padding. */
    private fun call(tokens: List<Int>): FloatArray {
        val (size, graph) = graphs.entries.first { it.key >= tokens.size }
        val hidden = graph.values("hidden")
        tokens.forEachIndexed { row, token -> embedding.read(token, hidden, row) }
        for (at in tokens.size * facts.shape.hiddenSize until hidden.capacity()) hidden.put(at, 0f)
        positions.write(length, size, graph::find)
        graph.run()
        for (state in states) state.add(graph.values("${state.name}_new"), size, length, tokens.size)
        length += tokens.size
        val logits = graph.values("logits")
        val from = (tokens.size - 1) * manifest.model.vocabSize
        return FloatArray(manifest.model.vocabSize) { logits.get(from + it) }
    }
}
