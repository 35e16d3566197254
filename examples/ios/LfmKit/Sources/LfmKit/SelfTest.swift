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

    /// Continues every prompt greedily and compares tokens.
    ///
    /// `margin` is how far apart the two best scores were where they were closest: arithmetic in
    /// another order may turn a choice that was closer than `tolerance`.
    public static func run(
        _ model: LanguageModel, bundle: URL, tolerance: Float = 0.05
    ) async throws -> [Result] {
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
            let close = golden.margin < tolerance
            let detail = equal ? "equal" : "equal up to token \(same)\(close ? ", a near tie" : "")"
            results.append(Result(text: golden.text, passed: equal || close, detail: detail))
        }
        return results
    }
}
