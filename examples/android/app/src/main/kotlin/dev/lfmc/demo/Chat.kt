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

/** The state of the screen and the actions of its buttons. */
class Chat(application: Application) : AndroidViewModel(application) {
    var status by mutableStateOf(string(R.string.unpacking))
        private set
    var answer by mutableStateOf("")
        private set
    var checks by mutableStateOf(emptyList<Check>())
        private set
    var isBusy by mutableStateOf(true)
        private set

    private var bundle: Bundle? = null
    private var model: LanguageModel? = null
    private var writer: Writer? = null

    init {
        work {
            val found = unpack(getApplication())
            status = string(R.string.opening)
            val opened = openModel(getApplication(), found)
            writer = Writer(opened, found)
            model = opened
            bundle = found
            status = string(R.string.ready, found.manifest.model.name)
        }
    }

    /** Asks in a new conversation and updates the answer with every token. */
    fun ask(message: String) {
        val manifest = bundle?.manifest ?: return
        val writer = writer ?: return
        answer = ""
        work {
            val form = manifest.chatPrompt ?: throw BundleException("The bundle has no chat prompt.")
            val prompt = form.replace("{message}", message)
            var begun = 0L
            writer.write(prompt, TEMPERATURE) { text, tokens ->
                if (tokens == 1) begun = System.nanoTime()
                answer = text
                val seconds = (System.nanoTime() - begun) / 1e9
                if (tokens > 1) status = string(R.string.speed, (tokens - 1) / seconds)
            }
        }
    }

    fun check() {
        val bundle = bundle ?: return
        val model = model ?: return
        work { checks = selfTest(model, bundle.golden()) }
    }

    fun stop() {
        writer?.stop()
    }

    override fun onCleared() {
        writer?.stop()
    }

    private fun string(id: Int, vararg values: Any): String =
        getApplication<Application>().getString(id, *values)

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
