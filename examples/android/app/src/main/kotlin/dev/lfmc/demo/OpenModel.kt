package dev.lfmc.demo

/** What runs a bundle, by what its manifest says. */
fun openModel(bundle: Bundle): LanguageModel =
    when (val target = bundle.manifest.target) {
        "executorch" -> ExecuTorchModel(bundle)
        else -> throw BundleException("The bundle is for $target, which this app has no runtime for.")
    }
