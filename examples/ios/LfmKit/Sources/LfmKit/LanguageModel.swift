import CoreML
import Foundation

/// One conversation with the package of a bundle.
///
/// Predictions with a state must not overlap, so an actor runs them one after the other. Do not use it
/// from two tasks at the same time: their tokens would continue the same conversation.
public actor LanguageModel {
    public nonisolated let manifest: Manifest
    public private(set) var length = 0

    private let prefill: MLModel
    private let decode: MLModel
    private var state: MLState
    private var ioStates: [String: MLFeatureValue]

    /// Compiles the package and loads both functions. Compiling a large model takes a while.
    public init(bundle: URL) async throws {
        manifest = try Manifest(bundle: bundle)
        let package = bundle.appending(path: manifest.package)
        let compiled = try await MLModel.compileModel(at: package)
        decode = try Self.load(compiled, function: "decode", units: manifest.units)
        prefill = try Self.load(compiled, function: "prefill", units: manifest.units)
        state = decode.makeState()
        ioStates = Self.zeros(manifest.ioStates)
    }

    private static func load(
        _ compiled: URL, function: String, units: MLComputeUnits
    ) throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.functionName = function
        configuration.computeUnits = units
        return try MLModel(contentsOf: compiled, configuration: configuration)
    }

    /// Starts a new conversation: sets all states to zeros.
    public func reset() {
        length = 0
        state = decode.makeState()
        ioStates = Self.zeros(manifest.ioStates)
    }

    private static func zeros(_ states: [Manifest.State]) -> [String: MLFeatureValue] {
        var values: [String: MLFeatureValue] = [:]
        for item in states {
            let zeros = MLShapedArray<Float16>(repeating: 0, shape: item.shape)
            values[item.name] = MLFeatureValue(shapedArray: zeros)
        }
        return values
    }

    /// Appends tokens to the conversation, and returns the logits of the last one.
    public func step(_ tokens: [Int]) throws -> [Float] {
        guard length + tokens.count <= manifest.context else {
            throw LfmError.contextIsFull(manifest.context)
        }
        var rest = tokens[...]
        var scores: [Float] = []
        while !rest.isEmpty {
            // A whole chunk must fit into the context. Otherwise, tokens are decoded one by one.
            let fits = length + manifest.chunk <= manifest.context
            let count = fits && rest.count > 1 ? min(rest.count, manifest.chunk) : 1
            scores = try call(Array(rest.prefix(count)))
            rest = rest.dropFirst(count)
            length += count
        }
        return scores
    }

    private func call(_ tokens: [Int]) throws -> [Float] {
        let chunked = tokens.count > 1
        let size = chunked ? manifest.chunk : 1
        let padding = [Int32](repeating: 0, count: size - tokens.count)
        var inputs = ioStates
        inputs["input_ids"] = feature(tokens.map(Int32.init) + padding, shape: [1, size])
        inputs["position"] = feature([Int32(length)], shape: [1])
        if chunked {
            inputs["valid"] = feature([Int32(tokens.count)], shape: [1])
        }
        let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
        let model = chunked ? prefill : decode
        let outputs = try model.prediction(from: provider, using: state)
        for item in manifest.ioStates {
            let name = item.name + "_out"
            guard let value = outputs.featureValue(for: name) else {
                throw LfmError.missingOutput(name)
            }
            ioStates[item.name] = value
        }
        let logits = outputs.featureValue(for: "logits")?.shapedArrayValue(of: Float16.self)
        guard let logits else { throw LfmError.missingOutput("logits") }
        return logits[0][tokens.count - 1].scalars.map(Float.init)
    }

    private func feature(_ values: [Int32], shape: [Int]) -> MLFeatureValue {
        MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: values, shape: shape))
    }
}
