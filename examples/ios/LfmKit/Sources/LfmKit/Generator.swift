import Foundation
import Tokenizers

/// A piece of generated text, and the generation speed.
public struct Piece: Sendable {
    public let text: String
    public let tokensPerSecond: Double
}

/// Text in, text out: tokenizer, chat template, sampling and stop tokens around a model.
public final class Generator: Sendable {
    public let model: LanguageModel
    private let tokenizer: any Tokenizer

    public init(bundle: URL) async throws {
        model = try await LanguageModel(bundle: bundle)
        tokenizer = try await AutoTokenizer.from(modelFolder: bundle)
    }

    /// Streams the answer to a message, in a new conversation.
    ///
    /// With `temperature` 0, each token is the most likely one.
    public func answer(
        to message: String, temperature: Float = 0.3, limit: Int = 512
    ) throws -> AsyncThrowingStream<Piece, Error> {
        let chat = [["role": "user", "content": message]]
        let prompt = try tokenizer.applyChatTemplate(messages: chat)
        return stream(prompt, temperature: temperature, limit: limit)
    }

    private func stream(
        _ prompt: [Int], temperature: Float, limit: Int
    ) -> AsyncThrowingStream<Piece, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    await model.reset()
                    var scores = try await model.step(prompt)
                    var generated: [Int] = []
                    var yieldedText = ""
                    let start = Date()
                    let length = await model.length
                    let room = min(limit, model.manifest.context - length)
                    while generated.count < room {
                        try Task.checkCancellation()
                        let token = sample(scores, temperature: temperature)
                        if model.manifest.tokens.stop.contains(token) { break }
                        generated.append(token)
                        // Yield whole characters only: a token may be a part of a character.
                        let text = tokenizer.decode(tokens: generated)
                        if !text.hasSuffix("\u{FFFD}"), text.hasPrefix(yieldedText) {
                            let speed = Double(generated.count) / -start.timeIntervalSinceNow
                            let piece = String(text.dropFirst(yieldedText.count))
                            continuation.yield(Piece(text: piece, tokensPerSecond: speed))
                            yieldedText = text
                        }
                        scores = try await model.step([token])
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func sample(_ scores: [Float], temperature: Float) -> Int {
        guard let best = scores.max(), temperature > 0 else { return argmax(scores) }
        let shares = scores.map { exp(($0 - best) / temperature) }
        var point = Float.random(in: 0..<1) * shares.reduce(0, +)
        for (token, share) in shares.enumerated() {
            point -= share
            if point <= 0 { return token }
        }
        return argmax(scores)
    }
}

/// Returns the index of the largest score.
func argmax(_ scores: [Float]) -> Int {
    scores.indices.max { scores[$0] < scores[$1] } ?? 0
}
