import SwiftUI

struct ContentView: View {
    @State private var chat = Chat()
    @State private var message = "Tell me a short story."

    var body: some View {
        NavigationStack {
            Form {
                Section("Message") {
                    TextField("Message", text: $message, axis: .vertical)
                    if chat.isBusy {
                        Button("Stop") { chat.stop() }
                    } else {
                        Button("Ask") { chat.ask(message) }
                    }
                }
                Section("Answer") { Text(chat.answer).textSelection(.enabled) }
                Section("Self-test") {
                    Button("Run the golden prompts") { chat.check() }.disabled(chat.isBusy)
                    ForEach(chat.checks, id: \.text) { result in
                        Label(
                            "\(result.text) ...: \(result.detail)",
                            systemImage: result.passed ? "checkmark.circle" : "xmark.octagon"
                        )
                    }
                }
                Section { Text(chat.status).font(.footnote) }
            }
            .navigationTitle("LFM")
        }
        .task { await chat.load() }
    }
}
