package dev.lfmc.demo

import ai.onnxruntime.NodeInfo
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.Closeable
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer

/**
 * A graph for calls of one length, and the memory that it reads and writes. Its inputs are among
 * `told` and the states. All graphs of a model share the states.
 */
class Graph(private val session: OrtSession, told: List<String>, states: List<KeptState>) : Closeable {
    private val environment = OrtEnvironment.getEnvironment()
    private val kept = states.associateBy { it.name }
    private val buffers = mutableMapOf<String, FloatBuffer>()
    private val inputs = session.inputInfo.mapValues { tensor(it.key, it.value) }
    private val outputs = session.outputInfo.mapValues { tensor(it.key, it.value) }

    init {
        val unknown = inputs.keys - told.toSet() - kept.keys
        if (unknown.isNotEmpty()) {
            throw BundleException("The graph takes $unknown, which the app does not know.")
        }
    }

    /** Returns the values of an input or output, or null if the graph has none of that name. */
    fun find(name: String): FloatBuffer? = buffers[name]

    fun values(name: String): FloatBuffer =
        find(name) ?: throw BundleException("The graph has no tensor $name.")

    fun run() = session.run(inputs, outputs).close()

    override fun close() {
        (inputs.values + outputs.values).forEach(OnnxTensor::close)
        session.close()
    }

    private fun tensor(name: String, info: NodeInfo): OnnxTensor {
        val shape = (info.info as TensorInfo).shape
        val state = kept[name]
        if (state != null && !state.shape.contentEquals(shape)) {
            val wants = shape.contentToString()
            throw BundleException("The graph's $name is $wants, not ${state.shape.contentToString()}.")
        }
        val values = state?.values ?: floats(shape)
        buffers[name] = values
        return OnnxTensor.createTensor(environment, values, shape)
    }
}

/** Allocates memory that a runtime reads and writes in place. */
fun floats(shape: LongArray): FloatBuffer {
    val count = shape.fold(1L, Long::times).toInt()
    return ByteBuffer.allocateDirect(4 * count).order(ByteOrder.nativeOrder()).asFloatBuffer()
}
