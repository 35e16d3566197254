import Foundation

/// The golden prompts of a bundle, on this device.
public struct SelfTest {
    struct Golden: Decodable {
        let text: String
        let prompt: [Int]
        let tokens: [Int]
        let margin: Float
    }

    public struct Result: Sendable {
        public let text: String
        public let passed: Bool
        public let detail: String
    }

    /// Continues every prompt greedily and compares tokens: all have to be equal.
    ///
    /// The margin is how far apart the two best scores were where they were closest. Other tokens
    /// behind a large one mean a fault; behind a tiny one, arithmetic in another order.
    public static func run(_ model: LanguageModel, bundle: URL) async throws -> [Result] {
        let data = try Data(contentsOf: bundle.appending(path: "golden.json"))
        var results: [Result] = []
        for golden in try JSONDecoder().decode([Golden].self, from: data) {
            model.reset()
            var scores = try await model.step(golden.prompt)
            var made: [Int] = []
            while made.count < golden.tokens.count {
                let token = likeliest(scores)
                made.append(token)
                if made.count < golden.tokens.count {
                    scores = try await model.step([token])
                }
            }
            let same = zip(made, golden.tokens).prefix { $0 == $1 }.count
            let equal = made == golden.tokens
            let detail = equal ? "equal" : "equal up to token \(same), margin \(golden.margin)"
            results.append(Result(text: golden.text, passed: equal, detail: detail))
        }
        return results
    }
}
