"""Embedding lookups: in a table of floats, or of n-bit codes."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    PrimFunc,
    build,
    cast,
    maybe_parallel,
    store,
    token_count,
    vector,
)
from lfmc.targets.tvm.kernels.matrix import Matrix
from lfmc.targets.tvm.kernels.row import dequantize_row, emit_for_row


def embedding(rows: int, columns: int, dtype: str, tokens: int | None) -> PrimFunc:
    """Look up ids int32 `[T]` in a table `[V, H]`; result float32 `[T, H]`."""
    count = token_count(tokens)
    parameters = [
        ("ids", (count,), "int32"),
        ("table", (rows, columns), dtype),
        ("y", (count, columns), "float32"),
    ]

    def body(ids: Buffer, table: Buffer, y: Buffer) -> None:
        with maybe_parallel(count, tokens) as token, T.serial(0, columns // LANES) as block:
            column = block * LANES
            store(y, cast(vector(table, ids[token], column), "float32"), token, column)

    return build(parameters, body)


def embedding_nbits(table: Matrix, tokens: int | None) -> PrimFunc:
    """Look up ids int32 `[T]` in an n-bit table; result float32 `[T, H]`."""
    count = token_count(tokens)
    parameters = [
        ("ids", (count,), "int32"),
        *table.parameters("table"),
        ("y", (count, table.columns), "float32"),
    ]

    def body(ids: Buffer, *rest: Buffer) -> None:
        *constants, y = rest
        with maybe_parallel(count, tokens) as token:
            emit_for_row(table, constants, ids[token], lambda row: dequantize_row(row, y, token))

    return build(parameters, body)
