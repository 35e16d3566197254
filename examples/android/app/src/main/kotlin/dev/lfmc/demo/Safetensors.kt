package dev.lfmc.demo

import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.decodeFromJsonElement
import kotlinx.serialization.json.jsonObject

/** The tensors of a mapped safetensors file; only tensors that are read take memory. */
class Safetensors(private val file: File) {
    @Serializable
    private data class Entry(
        val dtype: String,
        val shape: List<Int>,
        @SerialName("data_offsets") val offsets: List<Long>,
    )

    private val begin: Long
    private val entries: Map<String, Entry>

    init {
        RandomAccessFile(file, "r").use { from ->
            val size = ByteArray(8).also(from::readFully)
            val length = ByteBuffer.wrap(size).order(ByteOrder.LITTLE_ENDIAN).getLong()
            begin = 8 + length
            if (length < 0 || begin > from.length()) throw BundleException("${file.name} is cut off.")
            val header = ByteArray(length.toInt()).also(from::readFully).decodeToString()
            val told = JSON.parseToJsonElement(header).jsonObject - "__metadata__"
            entries = told.mapValues { JSON.decodeFromJsonElement<Entry>(it.value) }
            if (entries.values.any { begin + it.offsets[1] > from.length() }) {
                throw BundleException("${file.name} is cut off.")
            }
        }
    }

    val names: Set<String> get() = entries.keys

    fun tensor(name: String): Mapped {
        val entry = entries[name] ?: throw BundleException("${file.name} has no tensor $name.")
        val (from, to) = entry.offsets
        val bytes =
            RandomAccessFile(file, "r").use {
                it.channel.map(FileChannel.MapMode.READ_ONLY, begin + from, to - from)
            }
        return Mapped(entry.dtype, entry.shape, bytes.order(ByteOrder.LITTLE_ENDIAN))
    }
}

/** A tensor in a mapped file, in row-major order. */
class Mapped(private val dtype: String, val shape: List<Int>, private val bytes: ByteBuffer) {
    fun byte(index: Int): Int = bytes.get(index).toInt() and 0xff

    fun float(index: Int): Float =
        when (dtype) {
            "F32" -> bytes.getFloat(4 * index)
            "BF16" -> Float.fromBits(bytes.getShort(2 * index).toInt() shl 16)
            "F16" -> half(bytes.getShort(2 * index).toInt())
            else -> throw BundleException("A tensor has the type $dtype, which the app can't read.")
        }
}

/** Converts a float16. */
private fun half(bits: Int): Float {
    val sign = if (bits and 0x8000 != 0) -1f else 1f
    val exponent = bits shr 10 and 0x1f
    val fraction = bits and 0x3ff
    return when (exponent) {
        0 -> sign * Math.scalb(fraction.toFloat(), -24)
        31 -> if (fraction == 0) sign * Float.POSITIVE_INFINITY else Float.NaN
        else -> sign * Math.scalb((0x400 + fraction).toFloat(), exponent - 25)
    }
}
