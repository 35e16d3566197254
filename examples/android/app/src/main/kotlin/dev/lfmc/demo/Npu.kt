package dev.lfmc.demo

import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtEpDevice
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import ai.onnxruntime.OrtSession.SessionOptions
import android.content.Context
import android.os.Build
import android.system.Os
import java.io.File

/** Sessions on the phone's Hexagon NPU, by QNN's execution provider only. */
class Npu(context: Context, facts: QualcommFacts) {
    private val environment = OrtEnvironment.getEnvironment()
    private val asked =
        mapOf(
            "backend_type" to "htp",
            "enable_htp_fp16_precision" to if (facts.activations == "float16") "1" else "0",
        )

    init {
        // The folder in which the DSP looks for its part of QNN.
        Os.setenv("ADSP_LIBRARY_PATH", context.applicationInfo.nativeLibraryDir, true)
    }

    /** Opens a session of a graph. This takes a while if the device compiles the graph. */
    fun open(graph: File): OrtSession =
        try {
            SessionOptions().use { options ->
                options.addConfigEntry("session.disable_cpu_ep_fallback", "1")
                options.addExecutionProvider(devices(), asked)
                environment.createSession(graph.path, options)
            }
        } catch (error: OrtException) {
            throw BundleException("QNN can't run ${graph.name} on ${chip()}: ${error.message}")
        }

    /** Returns QNN's devices; registers its library first. */
    private fun devices(): List<OrtEpDevice> {
        val found = { environment.epDevices.filter { it.epName == PROVIDER } }
        if (found().isEmpty()) {
            try {
                environment.registerExecutionProviderLibrary(PROVIDER, LIBRARY)
            } catch (error: OrtException) {
                throw BundleException("The app has no QNN: see README.md. ${error.message}")
            }
        }
        return found().ifEmpty { throw BundleException("QNN finds no NPU on ${chip()}.") }
    }

    private companion object {
        const val PROVIDER = "QNNExecutionProvider"
        const val LIBRARY = "libonnxruntime_providers_qnn.so"
    }
}

/** Returns the name of the phone's chip, such as `SM8750`. */
fun chip(): String =
    if (Build.VERSION.SDK_INT >= Build.VERSION_CODES.S) Build.SOC_MODEL else "an unknown chip"
