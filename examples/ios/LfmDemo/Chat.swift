import Foundation
import LfmKit
import Observation

/// The state of the screen and the actions of its buttons.
@MainActor
@Observable
final class Chat {
    private(set) var status = String(localized: "Loading the model …")
    private(set) var answer = ""
    private(set) var checks: [SelfTest.Result] = []
    private(set) var isBusy = true

    private var generator: Generator?
    private var task: Task<Void, Never>?

    /// The folder that `lfmc export` wrote, added to the app as `Bundle`.
    private var bundle: URL? { Bundle.main.url(forResource: "Bundle", withExtension: nil) }

    func load() async {
        do {
            guard let bundle else {
                status = String(localized: "The app has no folder named Bundle: see README.md.")
                return
            }
            generator = try await Generator(bundle: bundle)
            status = String(localized: "Ready.")
            isBusy = false
        } catch {
            status = error.localizedDescription
        }
    }

    func ask(_ message: String) {
        run { [weak self] generator in
            self?.answer = ""
            for try await piece in try generator.answer(to: message) {
                self?.answer += piece.text
                let speed = piece.tokensPerSecond.formatted(.number.precision(.fractionLength(1)))
                self?.status = String(localized: "\(speed) tokens per second")
            }
        }
    }

    func check() {
        guard let bundle else { return }
        run { [weak self] generator in
            self?.checks = try await SelfTest.run(generator.model, bundle: bundle)
        }
    }

    func stop() { task?.cancel() }

    private func run(_ work: @escaping @MainActor (Generator) async throws -> Void) {
        guard let generator, !isBusy else { return }
        isBusy = true
        task = Task {
            do {
                try await work(generator)
            } catch is CancellationError {
                status = String(localized: "Stopped.")
            } catch {
                status = error.localizedDescription
            }
            isBusy = false
        }
    }
}
