package dev.lfmc.demo

import java.io.ByteArrayOutputStream
import java.io.File
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive

/** Converts text to tokens and back, by the byte pairs of a `tokenizer.json`. */
class Tokenizer(file: File) {
    private val told = JSON.parseToJsonElement(file.readText()).jsonObject
    private val model = told.getValue("model").jsonObject
    private val pieces = Pieces(told)
    private val vocabulary = model.getValue("vocab").jsonObject.mapValues { it.value.jsonPrimitive.int }
    private val ranks = merges(model)
    private val added = told.getValue("added_tokens").jsonArray.map { Added(it.jsonObject) }
    private val ids = added.associate { it.text to it.id }
    private val words = (vocabulary + ids).entries.associate { (word, id) -> id to word }
    private val markers = added.map { it.text }.sortedByDescending(String::length)
    private val marked = markers.joinToString("|", transform = Regex::escape).toRegex()

    private class Added(told: JsonObject) {
        val text = told.text("content")
        val id = told.getValue("id").jsonPrimitive.int
        val isSpecial = told.flag("special")

        init {
            val odd = listOf("lstrip", "rstrip", "single_word").any(told::flag)
            if (odd) refuse("adds $text in a way that the app can't")
        }
    }

    init {
        val extras = listOf("continuing_subword_prefix", "end_of_word_suffix", "dropout")
        val isPlain = extras.all { model.text(it) == "" }
        if (model.text("type") != "BPE" || !isPlain) refuse("has no plain byte pairs")
    }

    /** Returns the tokens of a text, which may contain added tokens by name. */
    fun encode(text: String): List<Int> {
        val made = mutableListOf<Int>()
        var at = 0
        for (marker in if (markers.isEmpty()) emptySequence() else marked.findAll(text)) {
            made += plain(text.substring(at, marker.range.first)) + ids.getValue(marker.value)
            at = marker.range.last + 1
        }
        return made + plain(text.substring(at))
    }

    /** Returns the text of tokens, without special tokens and without an incomplete last character. */
    fun decode(tokens: List<Int>): String {
        val hidden = added.filter { it.isSpecial }.map { it.id }.toSet()
        val bytes = ByteArrayOutputStream()
        for (token in tokens - hidden) {
            val word = words[token] ?: continue
            bytes.write(if (word in ids) word.encodeToByteArray() else pieces.bytes(word))
        }
        return bytes.toByteArray().decodeToString().trimEnd('\uFFFD')
    }

    private fun plain(text: String): List<Int> = pieces.of(text).flatMap(::merge)

    /** Merges the pair of the lowest rank until no pair has a rank. */
    private fun merge(piece: String): List<Int> {
        if (model.flag("ignore_merges")) vocabulary[piece]?.let { return listOf(it) }
        val parts = piece.map(Char::toString).toMutableList()
        while (parts.size > 1) {
            val pairs = parts.zipWithNext()
            val best = pairs.indices.minBy { ranks[pairs[it]] ?: Int.MAX_VALUE }
            if (pairs[best] !in ranks) break
            parts[best] += parts.removeAt(best + 1)
        }
        return parts.map { vocabulary[it] ?: refuse("has no word $it") }
    }
}

/** Returns the rank of each pair; older files write a pair as `left right`. */
private fun merges(model: JsonObject): Map<Pair<String, String>, Int> =
    model.getValue("merges").jsonArray.withIndex().associate { (rank, merge) ->
        val pair = (merge as? JsonArray)?.map { it.jsonPrimitive.content }
        val (left, right) = pair ?: merge.jsonPrimitive.content.split(" ")
        (left to right) to rank
    }
