import CoreML
import Foundation

/// The fields of a bundle's `manifest.json` that an app needs.
public struct Manifest: Decodable, Sendable {
    public struct Tokens: Decodable, Sendable {
        public let bos: Int?
        public let stop: [Int]
    }

    public struct State: Decodable, Sendable {
        public let name: String
        public let shape: [Int]
        public let keptBy: String
    }

    public let target: String
    public let context: Int
    public let package: String
    public let functions: [String: Int]
    public let computeUnits: String
    public let tokens: Tokens
    public let states: [State]

    /// The number of tokens per call of `prefill`.
    public var chunk: Int { functions["prefill"] ?? 1 }

    /// The states that are passed as inputs and outputs, because they are not in MLState.
    public var ioStates: [State] { states.filter { $0.keptBy != "MLState" } }

    public var units: MLComputeUnits {
        switch computeUnits {
        case "CPU_ONLY": return .cpuOnly
        case "CPU_AND_GPU": return .cpuAndGPU
        case "CPU_AND_NE": return .cpuAndNeuralEngine
        default: return .all
        }
    }

    public init(bundle: URL) throws {
        let data = try Data(contentsOf: bundle.appending(path: "manifest.json"))
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        self = try decoder.decode(Manifest.self, from: data)
        guard target == "coreml" else { throw LfmError.notForCoreML(target) }
    }
}

public enum LfmError: LocalizedError {
    case notForCoreML(String)
    case contextIsFull(Int)
    case missingOutput(String)

    public var errorDescription: String? {
        switch self {
        case .notForCoreML(let target): return "The bundle is for \(target), not for Core ML."
        case .contextIsFull(let context): return "The conversation is longer than \(context) tokens."
        case .missingOutput(let name): return "The package has no output \(name)."
        }
    }
}
