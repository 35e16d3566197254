plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
    alias(libs.plugins.kotlin.compose)
    alias(libs.plugins.kotlin.serialization)
}

android {
    namespace = "dev.lfmc.demo"
    compileSdk = 35

    defaultConfig {
        applicationId = "dev.lfmc.demo"
        minSdk = 27
        targetSdk = 35
        versionCode = 1
        versionName = "1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }

    // The first start copies the bundle out of the package, so compression would save nothing.
    androidResources { noCompress += listOf("pte", "onnx", "safetensors") }

    // The DSP opens its part of QNN as a file.
    packaging { jniLibs { useLegacyPackaging = true } }

    buildFeatures { compose = true }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
}

dependencies {
    implementation(platform(libs.compose.bom))
    implementation(libs.compose.material3)
    implementation(libs.activity.compose)
    implementation(libs.lifecycle.viewmodel.compose)
    implementation(libs.serialization.json)
    implementation(libs.executorch)
    implementation(libs.onnxruntime)
    // Under Qualcomm's own licence: see README.md.
    if (providers.gradleProperty("qnn").orNull == "accept") {
        runtimeOnly(libs.qnn.provider)
        runtimeOnly(libs.qnn.runtime)
    }
}
