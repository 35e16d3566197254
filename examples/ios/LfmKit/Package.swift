// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "LfmKit",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [.library(name: "LfmKit", targets: ["LfmKit"])],
    dependencies: [
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.3.3")
    ],
    targets: [
        .target(
            name: "LfmKit",
            dependencies: [.product(name: "Tokenizers", package: "swift-transformers")]
        )
    ]
)
