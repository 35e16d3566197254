"""Elementwise kernels for small tensors: sums, products, sigmoids, and copies of columns."""

from __future__ import annotations

from typing import Literal

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Columns,
    Expr,
    PrimFunc,
    build,
    cast,
    maybe_parallel,
    sigmoid,
    store,
    token_count,
)


def binary(
    kind: Literal["add", "mul"],
    columns: int,
    b_columns: int,
    tokens: int | None,
    *,
    constant: str | None,
) -> PrimFunc:
    """Add or multiply `a` `[T, F]` and `b` `[T, F2]`; each column of `b` applies to `F / F2`
    columns of `a`. With `constant`, `b` is `[F2]` of that dtype, the same for every token."""
    count = token_count(tokens)
    repeats = columns // b_columns
    parameters = [
        ("a", (count, columns), "float32"),
        ("b", (b_columns,) if constant else (count, b_columns), constant or "float32"),
        ("y", (count, columns), "float32"),
    ]

    def body(a: Buffer, b: Buffer, y: Buffer) -> None:
        with maybe_parallel(count, tokens) as token, T.serial(0, columns) as column:
            b_column = tirx.floordiv(column, repeats)
            a_value = a[token, column]
            b_value = cast(b[b_column] if constant else b[token, b_column], "float32")
            store(y, a_value + b_value if kind == "add" else a_value * b_value, token, column)

    return build(parameters, body)


def sigmoids(columns: int, tokens: int | None) -> PrimFunc:
    """Compute the sigmoid of `[T, F]`."""
    count = token_count(tokens)
    shape = (count, columns)

    def body(x: Buffer, y: Buffer) -> None:
        with maybe_parallel(count, tokens) as token, T.serial(0, columns) as column:
            store(y, sigmoid(x[token, column]), token, column)

    return build([("x", shape, "float32"), ("y", shape, "float32")], body)


def columns_of(columns: Columns, tokens: int | None) -> PrimFunc:
    """Copy some columns of a tensor: `[T, size]`."""
    count = token_count(tokens)

    def body(x: Buffer, y: Buffer) -> None:
        with maybe_parallel(count, tokens) as token, T.serial(0, columns.size) as column:
            store(y, x[token, columns.start + column], token, column)

    shapes = (count, columns.width), (count, columns.size)
    return build([("x", shapes[0], "float32"), ("y", shapes[1], "float32")], body)


def nothing(columns: int) -> PrimFunc:
    """Leave `[T, F]` unwritten; other kernels write the tensor later."""
    count: Expr = token_count(None)

    def body(y: Buffer) -> None:
        T.evaluate(tirx.const(0, "int32"))

    return build([("y", (count, columns), "float32")], body)


def last_of(columns: int) -> PrimFunc:
    """Copy the last row of `[T, F]`: `[1, F]`."""
    count: Expr = token_count(None)

    def body(x: Buffer, y: Buffer) -> None:
        with T.serial(0, columns) as column:
            store(y, x[count - 1, column], 0, column)

    return build([("x", (count, columns), "float32"), ("y", (1, columns), "float32")], body)
