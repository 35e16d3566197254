import CoreML
import Foundation

/// What `manifest.json` of a bundle says, as far as an app needs it.
public struct Manifest: Decodable {
    public struct Tokens: Decodable {
        public let bos: Int?
        public let stop: [Int]
    }

    public struct State: Decodable {
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

    /// Tokens that `prefill` takes at a time.
    public var chunk: Int { functions["prefill"] ?? 1 }

    /// States that are inputs and outputs, because the system does not keep them.
    public var passedStates: [State] { states.filter { $0.keptBy != "MLState" } }

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
