import SwiftUI

@main
struct LfmDemoApp: App {
    var body: some Scene {
        WindowGroup { ContentView() }
    }
}
