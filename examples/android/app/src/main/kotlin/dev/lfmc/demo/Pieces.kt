package dev.lfmc.demo

import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.boolean
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive

/** Splits text like a `tokenizer.json`, and encodes each byte as one printable character. */
class Pieces(told: JsonObject) {
    private val cuts = mutableListOf<Regex>()

    init {
        val first = told["pre_tokenizer"] as? JsonObject ?: refuse("has no pre-tokenizer")
        if ((told["normalizer"] ?: JsonNull) != JsonNull) refuse("has a normalizer")
        val steps = first["pretokenizers"]?.jsonArray?.map { it.jsonObject } ?: listOf(first)
        if (steps.last().text("type") != "ByteLevel") refuse("is not of bytes")
        for (step in steps) {
            when (step.text("type")) {
                "Split" -> cuts += cut(step)
                "ByteLevel" -> {
                    if (step.flag("add_prefix_space")) refuse("adds spaces")
                    if (step.flag("use_regex")) cuts += spelledOut(GPT2).toRegex()
                }
                else -> refuse("has the step ${step.text("type")}")
            }
        }
    }

    fun of(text: String): List<String> =
        cuts
            .fold(listOf(text)) { pieces, cut -> pieces.flatMap { isolated(it, cut) } }
            .map { piece -> piece.encodeToByteArray().map { LETTERS[it.toInt() and 0xff] }.joinToString("") }

    /** Returns the bytes of a word of the vocabulary. */
    fun bytes(word: String): ByteArray =
        ByteArray(word.length) { at ->
            val byte = BYTES[word[at]] ?: refuse("has the word $word")
            byte.toByte()
        }

    private fun cut(step: JsonObject): Regex {
        val pattern = step.getValue("pattern").jsonObject.text("Regex")
        if (pattern == "" || step.text("behavior") != "Isolated" || step.flag("invert")) {
            refuse("splits otherwise than the app can")
        }
        return spelledOut(pattern).toRegex()
    }

    /** Splits a text into the matches and the text between them. */
    private fun isolated(text: String, cut: Regex): List<String> {
        val found = cut.findAll(text).flatMap { listOf(it.range.first, it.range.last + 1) }
        val bounds = (sequenceOf(0) + found + text.length).distinct()
        return bounds.zipWithNext(text::substring).toList()
    }

    private companion object {
        const val GPT2 =
            """'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
        val LETTERS = letters()
        val BYTES = LETTERS.withIndex().associate { (byte, letter) -> letter to byte }
    }
}

/** Returns the printable character of each byte: the byte itself, or a character from 256 on. */
private fun letters(): List<Char> {
    val own = (33..126) + (161..172) + (174..255)
    var next = 256
    return (0..255).map { if (it in own) it.toChar() else (next++).toChar() }
}

/** Replaces `\s` by Unicode's white space, of which Java and Android only match a part. */
private fun spelledOut(pattern: String): String {
    val spaces = """\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"""
    var isInside = false
    return Regex("""\\.|.""", RegexOption.DOT_MATCHES_ALL).replace(pattern) { found ->
        when (found.value) {
            "[" -> "[".also { isInside = true }
            "]" -> "]".also { isInside = false }
            "\\s" -> if (isInside) spaces else "[$spaces]"
            "\\S" -> if (isInside) refuse("splits otherwise than the app can") else "[^$spaces]"
            else -> found.value
        }
    }
}

internal fun JsonObject.text(name: String): String =
    this[name]?.takeIf { it != JsonNull }?.jsonPrimitive?.content ?: ""

internal fun JsonObject.flag(name: String): Boolean = this[name]?.jsonPrimitive?.boolean ?: false

internal fun refuse(what: String): Nothing = throw BundleException("The bundle's tokenizer $what.")
