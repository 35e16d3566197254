package dev.lfmc.demo

import java.nio.FloatBuffer

/**
 * The embedding table, as n-bit codes, or as floats if the number of bits is 0. A table of the host
 * has one row per token; a table that the head shares has one column per token.
 */
class Embedding(table: Safetensors, facts: QualcommFacts) {
    private fun interface Values {
        fun at(token: Int, dim: Int): Float
    }

    private val size = facts.shape.hiddenSize
    private val values =
        table.run {
            val name = facts.embedding
            val bits = facts.embeddingBits
            val row = "host#$name"
            when {
                bits == 0 && row in names -> floatRows(tensor(row))
                bits == 0 -> floatColumns(tensor(name))
                "$row#codes" in names -> rows(tensor("$row#codes"), tensor("$row#scales"), bits)
                else -> {
                    val codes = names.firstOrNull { it.startsWith("$name#$bits:") }
                    columns(tensor(codes ?: "$name#$bits:"), tensor("$name#scales"), bits)
                }
            }
        }

    /** Writes the embedding of a token, float32 `[H]`, into a row of `[T, H]`. */
    fun read(token: Int, into: FloatBuffer, row: Int) {
        for (dim in 0 until size) into.put(row * size + dim, values.at(token, dim))
    }

    private fun floatRows(table: Mapped) = Values { token, dim -> table.float(token * size + dim) }

    private fun floatColumns(table: Mapped): Values {
        val words = table.shape[1]
        return Values { token, dim -> table.float(dim * words + token) }
    }

    /** Unsigned codes; the middle code represents 0. */
    private fun rows(codes: Mapped, scales: Mapped, bits: Int): Values {
        val width = codes.shape[1]
        return Values { token, dim ->
            val code = lane(codes, token * width, dim, bits)
            (code - (1 shl (bits - 1))) * scales.float(token)
        }
    }

    /** Signed codes. */
    private fun columns(codes: Mapped, scales: Mapped, bits: Int): Values {
        val width = codes.shape[0] / size
        val middle = 1 shl (bits - 1)
        return Values { token, dim ->
            val code = lane(codes, dim * width, token, bits)
            ((code xor middle) - middle) * scales.float(token)
        }
    }

    /** Returns the n-bit number at an index of a line that starts at a byte, lowest bits first. */
    private fun lane(codes: Mapped, line: Int, at: Int, bits: Int): Int {
        val each = 8 / bits
        return codes.byte(line + at / each) shr (bits * (at % each)) and ((1 shl bits) - 1)
    }
}

/** Opens the table of a bundle: the host's, else the file for compiled graphs, else the head's. */
fun embedding(bundle: Bundle, facts: QualcommFacts): Embedding {
    val own = Safetensors(bundle.file("host.safetensors"))
    val other = if (facts.isCompiled) "embedding.safetensors" else "params.safetensors"
    return Embedding(if (own.names.isEmpty()) Safetensors(bundle.file(other)) else own, facts)
}
