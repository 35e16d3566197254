"""Kernels in which a thread computes one number, or a few, on its own."""

from __future__ import annotations

from typing import Literal

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Columns,
    Expr,
    Parameter,
    PrimFunc,
    bind,
    build,
    cast,
    local,
    put,
    sigmoid,
    tokens_of,
)
from lfmc.targets.tvm.kernels.gpu.grid import each
from lfmc.targets.tvm.kernels.layout import COLUMNS
from lfmc.targets.tvm.kernels.matrix import Matrix
from lfmc.targets.tvm.kernels.row import Row, code_of, in_block_or_tail


def _split(at: Expr, size: Expr) -> tuple[Expr, Expr]:
    return bind(tirx.floordiv(at, size)), bind(tirx.floormod(at, size))


def swiglu(gate: Columns, up: Columns, tokens: int | None) -> PrimFunc:
    count = tokens_of(tokens)
    parameters = [
        ("gate", (count, gate.width), "float32"),
        ("up", (count, up.width), "float32"),
        ("y", (count, gate.size), "float32"),
    ]

    def body(first: Buffer, second: Buffer, y: Buffer) -> None:
        def one(at: Expr) -> None:
            token, column = _split(at, gate.size)
            value = bind(first[token, gate.start + column])
            put(y, value * sigmoid(value) * second[token, up.start + column], token, column)

        each(count * gate.size, one)

    return build(parameters, body)


def binary(
    kind: Literal["add", "mul"],
    columns: int,
    other: int,
    tokens: int | None,
    *,
    constant: str | None,
) -> PrimFunc:
    count, share = tokens_of(tokens), columns // other
    parameters = [
        ("a", (count, columns), "float32"),
        ("b", (other,) if constant else (count, other), constant or "float32"),
        ("y", (count, columns), "float32"),
    ]

    def body(a: Buffer, b: Buffer, y: Buffer) -> None:
        def one(at: Expr) -> None:
            token, column = _split(at, columns)
            place = tirx.floordiv(column, share)
            right = cast(b[place] if constant else b[token, place], "float32")
            left = a[token, column]
            put(y, left + right if kind == "add" else left * right, token, column)

        each(count * columns, one)

    return build(parameters, body)


def sigmoids(columns: int, tokens: int | None) -> PrimFunc:
    count = tokens_of(tokens)
    shape = (count, columns)

    def body(x: Buffer, y: Buffer) -> None:
        def one(at: Expr) -> None:
            token, column = _split(at, columns)
            put(y, sigmoid(bind(x[token, column])), token, column)

        each(count * columns, one)

    return build([("x", shape, "float32"), ("y", shape, "float32")], body)


def columns_of(chosen: Columns, tokens: int | None) -> PrimFunc:
    count = tokens_of(tokens)
    shapes = (count, chosen.width), (count, chosen.size)

    def body(x: Buffer, y: Buffer) -> None:
        def one(at: Expr) -> None:
            token, column = _split(at, chosen.size)
            put(y, x[token, chosen.start + column], token, column)

        each(count * chosen.size, one)

    return build([("x", shapes[0], "float32"), ("y", shapes[1], "float32")], body)


def last_of(columns: int) -> PrimFunc:
    count = tokens_of(None)

    def body(x: Buffer, y: Buffer) -> None:
        each(columns, lambda at: put(y, x[count - 1, at], 0, at))

    return build([("x", (count, columns), "float32"), ("y", (1, columns), "float32")], body)


def embedding(rows: int, columns: int, dtype: str, tokens: int | None) -> PrimFunc:
    count = tokens_of(tokens)
    parameters = [
        ("ids", (count,), "int32"),
        ("table", (rows, columns), dtype),
        ("y", (count, columns), "float32"),
    ]

    def body(ids: Buffer, table: Buffer, y: Buffer) -> None:
        def one(at: Expr) -> None:
            token, column = _split(at, columns)
            put(y, cast(table[ids[token], column], "float32"), token, column)

        each(count * columns, one)

    return build(parameters, body)


def embedding_nbits(table: Matrix, tokens: int | None) -> PrimFunc:
    count, pieces = tokens_of(tokens), table.columns // COLUMNS
    parameters = [
        ("ids", (count,), "int32"),
        *table.parameters("table"),
        ("y", (count, table.columns), "float32"),
    ]

    def body(ids: Buffer, *rest: Buffer) -> None:
        *constants, y = rest

        def one(at: Expr) -> None:
            token, piece = _split(at, pieces)
            group, chunk = _split(piece, table.chunks)

            def write(row: Row) -> None:
                zero, scale = bind(row.zero(group)), bind(row.scale(group))
                for quad in range(8):
                    word = bind(row.quad(group, chunk, quad))
                    for byte in range(4):
                        value = cast(code_of(word, byte) - zero, "float32") * scale
                        put(y, value, token, piece * COLUMNS + 4 * quad + byte)

            in_block_or_tail(table, constants, bind(ids[token]), write)

        each(count * pieces, one)

    return build(parameters, body)


def gated_short_conv(
    size: int, taps: int, dtype: str, tokens: int | None, *, bias: str | None
) -> PrimFunc:
    """A thread a channel, token by token."""
    count, back = tokens_of(tokens), taps - 1
    parameters: list[Parameter] = [
        ("bcx", (count, 3 * size), "float32"),
        ("taps", (taps, size), dtype),
    ]
    if bias:
        parameters.append(("bias", (size,), bias))
    parameters += [("state", (back, size), "float32"), ("y", (count, size), "float32")]

    def body(bcx: Buffer, weight: Buffer, *rest: Buffer) -> None:
        *own_bias, state, y = rest

        def one(at: Expr) -> None:
            seen, mixed = local(taps), local(1)
            for tap in range(back):
                put(seen, state[tap, at], tap)
            with T.serial(0, count) as token:
                put(seen, bcx[token, at] * bcx[token, 2 * size + at], back)
                begin = cast(own_bias[0][at], "float32") if bias else tirx.const(0.0, "float32")
                put(mixed, begin, 0)
                for tap in range(taps):
                    put(mixed, mixed[0] + seen[tap] * cast(weight[tap, at], "float32"), 0)
                put(y, bcx[token, size + at] * mixed[0], token, at)
                for tap in range(back):
                    put(seen, bind(seen[tap + 1]), tap)
            for tap in range(back):
                put(state, seen[tap], tap, at)

        each(size, one)

    return build(parameters, body)


def angles(dim: int, tokens: int | None) -> PrimFunc:
    count, half = tokens_of(tokens), dim // 2
    parameters = [
        ("start", (1,), "int32"),
        ("steps", (half,), "float32"),
        ("cos", (count, dim), "float32"),
        ("sin", (count, dim), "float32"),
    ]

    def body(start: Buffer, steps: Buffer, cos: Buffer, sin: Buffer) -> None:
        def one(at: Expr) -> None:
            token, column = _split(at, half)
            angle = bind(cast(start[0] + token, "float32") * steps[column])
            for table, value in ((cos, bind(tirx.cos(angle))), (sin, bind(tirx.sin(angle)))):
                put(table, value, token, column)
                put(table, value, token, column + half)

        each(count * half, one)

    return build(parameters, body)


def combine(size: int, top_k: int, tokens: int | None) -> PrimFunc:
    count = tokens_of(tokens)
    parameters = [
        ("shares", (count, top_k), "float32"),
        ("x", (count * top_k, size), "float32"),
        ("y", (count, size), "float32"),
    ]

    def body(shares: Buffer, x: Buffer, y: Buffer) -> None:
        def one(at: Expr) -> None:
            token, column = _split(at, size)
            whole = tirx.const(0.0, "float32")
            for slot in range(top_k):
                whole = whole + x[token * top_k + slot, column] * shares[token, slot]
            put(y, whole, token, column)

        each(count * size, one)

    return build(parameters, body)
