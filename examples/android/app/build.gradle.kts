plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.compose)
    alias(libs.plugins.kotlin.serialization)
}

// QNN's runtime is under Qualcomm's own license: see README.md.
val acceptsQnn = providers.gradleProperty("qnn").orNull == "accept"

android {
    namespace = "dev.lfmc.demo"
    compileSdk { version = release(37) }

    defaultConfig {
        applicationId = "dev.lfmc.demo"
        minSdk { version = release(27) }
        targetSdk { version = release(37) }
        versionCode = 1
        versionName = "1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }

    // The first start copies the bundle out of the package, so compression would save nothing.
    androidResources { noCompress += listOf("pte", "onnx", "safetensors") }

    // The DSP opens its part of QNN as a file. Without QNN, Android maps the libraries in the package.
    packaging { jniLibs { useLegacyPackaging = acceptsQnn } }

    buildFeatures { compose = true }

    // Kotlin compiles for the same version of the JVM.
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

dependencies {
    implementation(platform(libs.compose.bom))
    implementation(libs.compose.material3)
    implementation(libs.activity.compose)
    implementation(libs.lifecycle.viewmodel.compose)
    implementation(libs.serialization.json)
    implementation(libs.executorch)
    implementation(libs.onnxruntime)
    if (acceptsQnn) {
        runtimeOnly(libs.qnn.provider)
        runtimeOnly(libs.qnn.runtime)
    }
}
