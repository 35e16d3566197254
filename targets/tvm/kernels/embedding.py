"""Rows of a table: of floats, or of n-bit codes."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    PrimFunc,
    build,
    cast,
    over_tokens,
    put,
    tokens_of,
    vector,
)
from lfmc.targets.tvm.kernels.matrix import Matrix, weights_of_row


def embedding(rows: int, columns: int, dtype: str, tokens: int | None) -> PrimFunc:
    """Ids int32 `[T]` and a table `[V, H]`; result float32 `[T, H]`."""
    count = tokens_of(tokens)
    parameters = [
        ("ids", (count,), "int32"),
        ("table", (rows, columns), dtype),
        ("y", (count, columns), "float32"),
    ]

    def body(ids: Buffer, table: Buffer, y: Buffer) -> None:
        with over_tokens(count, tokens) as token, T.serial(0, columns // LANES) as block:
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
        with over_tokens(count, tokens) as token:
            if table.tail:
                with T.If(ids[token] < tirx.const(table.rows - table.tail, "int32")):
                    with T.Then():
                        weights_of_row(table, constants, ids[token], y, token, tail=False)
                    with T.Else():
                        weights_of_row(table, constants, ids[token], y, token, tail=True)
            else:
                weights_of_row(table, constants, ids[token], y, token, tail=False)

    return build(parameters, body)
