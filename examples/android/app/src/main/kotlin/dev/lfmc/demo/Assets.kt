package dev.lfmc.demo

import android.content.Context
import android.content.res.AssetManager
import java.io.File
import java.io.FileNotFoundException
import java.io.InputStream

private const val ASSETS = "bundle"

/**
 * Copies the bundle out of the app's assets, unless an earlier start copied it. Android never backs
 * the copy up. The copy takes a while: call this on a background thread.
 */
fun unpack(context: Context): Bundle {
    val assets = context.assets
    if ("manifest.json" !in assets.list(ASSETS).orEmpty()) {
        throw BundleException("The app has no bundle: see README.md.")
    }
    val text = read(assets, "manifest.json").bufferedReader().use { it.readText() }
    val folder = File(context.noBackupFilesDir, ASSETS)
    val stamp = File(folder, "manifest.json")
    if (!stamp.exists() || stamp.readText() != text) {
        folder.deleteRecursively()
        folder.mkdirs()
        val needed = JSON.decodeFromString<Manifest>(text).files - needless(text)
        for ((name, stored) in needed) {
            val file = File(folder, name)
            read(assets, name).use { from -> file.outputStream().use(from::copyTo) }
            if (file.length() != stored.nbytes) {
                throw BundleException("$name has ${file.length()} bytes, not ${stored.nbytes}.")
            }
        }
        stamp.writeText(text)
    }
    return Bundle(folder)
}

private fun read(assets: AssetManager, name: String): InputStream =
    try {
        assets.open("$ASSETS/$name")
    } catch (missing: FileNotFoundException) {
        throw BundleException("The app's bundle lacks $name.")
    }
