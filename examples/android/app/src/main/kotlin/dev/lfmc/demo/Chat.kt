package dev.lfmc.demo

import android.app.Application
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.setValue
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.viewModelScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmGenerationConfig
import org.pytorch.executorch.extension.llm.LlmModule

/**
 * What the screen shows, and what its buttons do.
 *
 * Text is ExecuTorch's own runner's work: it tokenizes, samples, and stops at the tokens that the
 * program names as its ends.
 */
class Chat(application: Application) : AndroidViewModel(application) {
    var status by mutableStateOf("Unpacking the model ...")
        private set
    var answer by mutableStateOf("")
        private set
    var checks by mutableStateOf(emptyList<Check>())
        private set
    var isBusy by mutableStateOf(true)
        private set

    private var bundle: Bundle? = null
    private var runner: LlmModule? = null

    init {
        work {
            val found = Bundle.unpack(getApplication())
            bundle = found
            runner = LlmModule(found.program, found.tokenizer, TEMPERATURE).apply { load() }
            status = "${found.manifest.model.name} is ready."
        }
    }

    /** Asks in a new conversation; the answer comes piece by piece. */
    fun ask(message: String) {
        val manifest = bundle?.manifest ?: return
        val runner = runner ?: return
        answer = ""
        work {
            val form = manifest.chatPrompt ?: throw BundleException("The bundle has no chat prompt.")
            val prompt = form.replace("{message}", message)
            val config =
                LlmGenerationConfig.create()
                    .echo(false)
                    .seqLen(manifest.context)
                    .temperature(TEMPERATURE)
                    .build()
            runner.resetContext()
            var pieces = 0
            var begun = 0L
            runner.generate(
                prompt,
                config,
                object : LlmCallback {
                    override fun onResult(result: String) {
                        if (pieces++ == 0) begun = System.nanoTime()
                        answer += result
                        val seconds = (System.nanoTime() - begun) / 1e9
                        if (pieces > 1) status = "%.1f tokens per second".format((pieces - 1) / seconds)
                    }

                    override fun onError(errorCode: Int, message: String) {
                        status = "Error $errorCode: $message"
                    }
                },
            )
        }
    }

    fun check() {
        val bundle = bundle ?: return
        work { checks = selfTest(bundle) }
    }

    fun stop() {
        runner?.stop()
    }

    override fun onCleared() {
        runner?.stop()
    }

    private fun work(task: () -> Unit) {
        isBusy = true
        viewModelScope.launch {
            try {
                withContext(Dispatchers.Default) { task() }
            } catch (error: Exception) {
                status = error.message ?: error.toString()
            }
            isBusy = false
        }
    }

    private companion object {
        const val TEMPERATURE = 0.3f
    }
}
