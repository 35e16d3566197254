// Kotlin itself is built into the Android plugin, in the version of these two plugins of Kotlin's.
plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.kotlin.compose) apply false
    alias(libs.plugins.kotlin.serialization) apply false
}
