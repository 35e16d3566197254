"""Rows of a table: of floats, or of n-bit codes."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    PrimFunc,
    build,
    cast,
    put,
    side_by_side,
    tokens_of,
    vector,
)
from lfmc.targets.tvm.kernels.matrix import Matrix
from lfmc.targets.tvm.kernels.row import in_block_or_tail, weights_of_row


def embedding(rows: int, columns: int, dtype: str, tokens: int | None) -> PrimFunc:
    """Ids int32 `[T]` and a table `[V, H]`; result float32 `[T, H]`."""
    count = tokens_of(tokens)
    parameters = [
        ("ids", (count,), "int32"),
        ("table", (rows, columns), dtype),
        ("y", (count, columns), "float32"),
    ]

    def body(ids: Buffer, table: Buffer, y: Buffer) -> None:
        with side_by_side(count, tokens) as token, T.serial(0, columns // LANES) as block:
            at = block * LANES
            put(y, cast(vector(table, ids[token], at), "float32"), token, at)

    return build(parameters, body)


def embedding_nbits(table: Matrix, tokens: int | None) -> PrimFunc:
    """Ids int32 `[T]` and the table's constants; result float32 `[T, H]`."""
    count = tokens_of(tokens)
    parameters = [
        ("ids", (count,), "int32"),
        *table.parameters("table"),
        ("y", (count, table.columns), "float32"),
    ]

    def body(ids: Buffer, *rest: Buffer) -> None:
        *constants, y = rest
        with side_by_side(count, tokens) as token:
            in_block_or_tail(
                table, constants, ids[token], lambda row: weights_of_row(row, y, token)
            )

    return build(parameters, body)
