package dev.lfmc.demo

import android.os.Bundle as SavedState
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.activity.enableEdgeToEdge
import androidx.activity.viewModels
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.safeDrawingPadding
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedButton
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Surface
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.res.stringResource
import androidx.compose.ui.unit.dp

class MainActivity : ComponentActivity() {
    private val chat: Chat by viewModels()

    override fun onCreate(savedInstanceState: SavedState?) {
        enableEdgeToEdge()
        super.onCreate(savedInstanceState)
        setContent { MaterialTheme { Surface(Modifier.fillMaxSize()) { ChatScreen(chat) } } }
    }
}

@Composable
fun ChatScreen(chat: Chat) {
    var message by rememberSaveable { mutableStateOf("") }
    Column(
        Modifier.safeDrawingPadding().padding(16.dp),
        verticalArrangement = Arrangement.spacedBy(12.dp),
    ) {
        Text(chat.status, style = MaterialTheme.typography.labelLarge)
        OutlinedTextField(
            message,
            { message = it },
            Modifier.fillMaxWidth(),
            label = { Text(stringResource(R.string.message)) },
        )
        Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
            Button({ chat.ask(message) }, enabled = !chat.isBusy && message.isNotBlank()) {
                Text(stringResource(R.string.ask))
            }
            OutlinedButton(chat::stop, enabled = chat.isBusy) { Text(stringResource(R.string.stop)) }
            OutlinedButton(chat::check, enabled = !chat.isBusy) {
                Text(stringResource(R.string.check))
            }
        }
        Column(Modifier.weight(1f).verticalScroll(rememberScrollState())) {
            for (check in chat.checks) {
                val form = if (check.passed) R.string.passed else R.string.failed
                Text(stringResource(form, check.text, check.detail))
            }
            Text(chat.answer)
        }
    }
}
