import Foundation

/// Runs the golden prompts of a bundle on this device.
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

    /// Continues every prompt greedily and compares the tokens, which must be equal.
    ///
    /// The margin is the smallest difference between the two best scores at any token. Different
    /// tokens despite a large margin indicate a fault. With a tiny margin, a different order of
    /// arithmetic can cause them.
    public static func run(_ model: LanguageModel, bundle: URL) async throws -> [Result] {
        let data = try Data(contentsOf: bundle.appending(path: "golden.json"))
        var results: [Result] = []
        for golden in try JSONDecoder().decode([Golden].self, from: data) {
            await model.reset()
            var scores = try await model.step(golden.prompt)
            var generated: [Int] = []
            while generated.count < golden.tokens.count {
                try Task.checkCancellation()
                let token = argmax(scores)
                generated.append(token)
                if generated.count < golden.tokens.count {
                    scores = try await model.step([token])
                }
            }
            let prefix = zip(generated, golden.tokens).prefix { $0 == $1 }.count
            let equal = generated == golden.tokens
            let detail = equal ? "equal" : "equal up to token \(prefix), margin \(golden.margin)"
            results.append(Result(text: golden.text, passed: equal, detail: detail))
        }
        return results
    }
}
