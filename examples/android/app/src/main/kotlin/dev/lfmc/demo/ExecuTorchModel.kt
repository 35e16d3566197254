package dev.lfmc.demo

import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** A program that stores the conversation itself, and resets it in a call at position 0. */
class ExecuTorchModel(bundle: Bundle) : LanguageModel {
    private val manifest = bundle.manifest
    private val chunk = JSON.decodeFromString<ExecuTorchFacts>(bundle.json).chunk
    private val program = bundle.file(manifest.artifact.single()).path
    private val module = Module.load(program, Module.LOAD_MODE_MMAP)
    private var length = 0

    override fun reset() {
        length = 0
    }

    override fun step(tokens: List<Int>): FloatArray {
        manifest.requireTokens(tokens, length)
        var scores = FloatArray(0)
        for (piece in tokens.chunked(chunk)) {
            val ids = LongArray(piece.size) { piece[it].toLong() }
            val input = Tensor.fromBlob(ids, longArrayOf(1, piece.size.toLong()))
            val position = Tensor.fromBlob(longArrayOf(length.toLong()), longArrayOf(1))
            val output = module.forward(EValue.from(input), EValue.from(position))
            val all = output[0].toTensor().dataAsFloatArray
            scores = all.copyOfRange(all.size - manifest.model.vocabSize, all.size)
            length += piece.size
        }
        return scores
    }

    override fun close() = module.close()
}
