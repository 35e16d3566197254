import Foundation
import LfmKit

/// The state of the screen and the actions of its buttons.
@MainActor
final class Chat: ObservableObject {
    @Published var status = "Loading the model ..."
    @Published var answer = ""
    @Published var checks: [SelfTest.Result] = []
    @Published var isBusy = true

    private var generator: Generator?
    private var task: Task<Void, Never>?

    /// The folder that `lfmc export` wrote, added to the app as `Bundle`.
    private var bundle: URL? { Bundle.main.url(forResource: "Bundle", withExtension: nil) }

    func load() async {
        do {
            guard let bundle else {
                status = "The app has no folder named Bundle: see README.md."
                return
            }
            generator = try await Generator(bundle: bundle)
            status = "Ready."
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
                self?.status = String(format: "%.1f tokens per second", piece.tokensPerSecond)
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

    private func run(_ work: @escaping (Generator) async throws -> Void) {
        guard let generator, !isBusy else { return }
        isBusy = true
        task = Task {
            do {
                try await work(generator)
            } catch is CancellationError {
                status = "Stopped."
            } catch {
                status = error.localizedDescription
            }
            isBusy = false
        }
    }
}
