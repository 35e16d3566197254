package dev.lfmc.demo

import java.io.File

/** The folder that `lfmc export` wrote; its files can be mapped by a runtime. */
class Bundle(private val folder: File) {
    val json: String = file("manifest.json").readText()
    val manifest: Manifest = JSON.decodeFromString(json)

    fun golden(): List<Golden> = JSON.decodeFromString(file("golden.json").readText())

    fun file(name: String): File {
        val file = File(folder, name)
        if (!file.isFile) throw BundleException("The bundle lacks $name.")
        return file
    }
}
