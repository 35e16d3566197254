package dev.lfmc.demo

import android.content.Context

/** Opens a bundle with the runtime that its manifest requires. */
fun openModel(context: Context, bundle: Bundle): LanguageModel =
    when (val target = bundle.manifest.target) {
        "executorch" -> ExecuTorchModel(bundle)
        "qualcomm" -> {
            val facts = JSON.decodeFromString<QualcommFacts>(bundle.json)
            facts.requireRunnable(chip())
            NpuModel(bundle, Npu(context, facts)::open)
        }
        else -> throw BundleException("The bundle is for $target, which this app has no runtime for.")
    }
