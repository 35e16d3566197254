"""Sums, products and sigmoids of what is small: a router's scores, a gate of heads."""

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
    put,
    side_by_side,
    sigmoid,
    tokens_of,
)


def binary(
    kind: Literal["add", "mul"],
    columns: int,
    other: int,
    tokens: int | None,
    *,
    constant: str | None,
) -> PrimFunc:
    """`a` `[T, F]` with `b` `[T, F2]`, each of whose columns counts for `F / F2` of `a`; with
    `constant`, `b` is `[F2]` of that dtype, the same for every token."""
    count = tokens_of(tokens)
    each = columns // other
    parameters = [
        ("a", (count, columns), "float32"),
        ("b", (other,) if constant else (count, other), constant or "float32"),
        ("y", (count, columns), "float32"),
    ]

    def body(a: Buffer, b: Buffer, y: Buffer) -> None:
        with side_by_side(count, tokens) as token, T.serial(0, columns) as column:
            at = tirx.floordiv(column, each)
            left = a[token, column]
            right = cast(b[at] if constant else b[token, at], "float32")
            put(y, left + right if kind == "add" else left * right, token, column)

    return build(parameters, body)


def sigmoids(columns: int, tokens: int | None) -> PrimFunc:
    """Of `[T, F]`."""
    count = tokens_of(tokens)
    shape = (count, columns)

    def body(x: Buffer, y: Buffer) -> None:
        with side_by_side(count, tokens) as token, T.serial(0, columns) as column:
            put(y, sigmoid(x[token, column]), token, column)

    return build([("x", shape, "float32"), ("y", shape, "float32")], body)


def columns_of(chosen: Columns, tokens: int | None) -> PrimFunc:
    """Some columns of a value: `[T, size]`."""
    count = tokens_of(tokens)

    def body(x: Buffer, y: Buffer) -> None:
        with side_by_side(count, tokens) as token, T.serial(0, chosen.size) as column:
            put(y, x[token, chosen.start + column], token, column)

    shapes = (count, chosen.width), (count, chosen.size)
    return build([("x", shapes[0], "float32"), ("y", shapes[1], "float32")], body)


def nothing(columns: int) -> PrimFunc:
    """`[T, F]` that is not written: others do."""
    count: Expr = tokens_of(None)

    def body(y: Buffer) -> None:
        T.evaluate(tirx.const(0, "int32"))

    return build([("y", (count, columns), "float32")], body)


def last_of(columns: int) -> PrimFunc:
    """The last row of `[T, F]`: `[1, F]`."""
    count: Expr = tokens_of(None)

    def body(x: Buffer, y: Buffer) -> None:
        with T.serial(0, columns) as column:
            put(y, x[count - 1, column], 0, column)

    return build([("x", (count, columns), "float32"), ("y", (1, columns), "float32")], body)
