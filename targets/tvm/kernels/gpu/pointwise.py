"""Kernels in which a thread computes one number, or a few, independently of other threads."""

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
    alloc_local,
    bind,
    build,
    cast,
    sigmoid,
    store,
    token_count,
)
from lfmc.targets.tvm.kernels.gpu.grid import for_each
from lfmc.targets.tvm.kernels.layout import COLUMNS
from lfmc.targets.tvm.kernels.matrix import Matrix
from lfmc.targets.tvm.kernels.row import Row, emit_for_row, extract_code


def _divmod(index: Expr, size: Expr) -> tuple[Expr, Expr]:
    """Return the quotient and the remainder."""
    return bind(tirx.floordiv(index, size)), bind(tirx.floormod(index, size))


def swiglu(gate: Columns, up: Columns, tokens: int | None) -> PrimFunc:
    """Compute SwiGLU of two tensors whose columns include gate and up."""
    count = token_count(tokens)
    parameters = [
        ("gate", (count, gate.width), "float32"),
        ("up", (count, up.width), "float32"),
        ("y", (count, gate.size), "float32"),
    ]

    def body(gate_buffer: Buffer, up_buffer: Buffer, y: Buffer) -> None:
        def compute(index: Expr) -> None:
            token, column = _divmod(index, gate.size)
            value = bind(gate_buffer[token, gate.start + column])
            store(y, value * sigmoid(value) * up_buffer[token, up.start + column], token, column)

        for_each(count * gate.size, compute)

    return build(parameters, body)


def binary(
    kind: Literal["add", "mul"],
    columns: int,
    b_columns: int,
    tokens: int | None,
    *,
    constant: str | None,
) -> PrimFunc:
    """Add or multiply two tensors, as the CPU kernel does."""
    count, repeats = token_count(tokens), columns // b_columns
    parameters = [
        ("a", (count, columns), "float32"),
        ("b", (b_columns,) if constant else (count, b_columns), constant or "float32"),
        ("y", (count, columns), "float32"),
    ]

    def body(a: Buffer, b: Buffer, y: Buffer) -> None:
        def compute(index: Expr) -> None:
            token, column = _divmod(index, columns)
            b_column = tirx.floordiv(column, repeats)
            b_value = cast(b[b_column] if constant else b[token, b_column], "float32")
            a_value = a[token, column]
            store(y, a_value + b_value if kind == "add" else a_value * b_value, token, column)

        for_each(count * columns, compute)

    return build(parameters, body)


def sigmoids(columns: int, tokens: int | None) -> PrimFunc:
    """Compute the sigmoid of every element."""
    count = token_count(tokens)
    shape = (count, columns)

    def body(x: Buffer, y: Buffer) -> None:
        def compute(index: Expr) -> None:
            token, column = _divmod(index, columns)
            store(y, sigmoid(bind(x[token, column])), token, column)

        for_each(count * columns, compute)

    return build([("x", shape, "float32"), ("y", shape, "float32")], body)


def columns_of(columns: Columns, tokens: int | None) -> PrimFunc:
    """Copy some columns of a tensor."""
    count = token_count(tokens)
    shapes = (count, columns.width), (count, columns.size)

    def body(x: Buffer, y: Buffer) -> None:
        def compute(index: Expr) -> None:
            token, column = _divmod(index, columns.size)
            store(y, x[token, columns.start + column], token, column)

        for_each(count * columns.size, compute)

    return build([("x", shapes[0], "float32"), ("y", shapes[1], "float32")], body)


def last_of(columns: int) -> PrimFunc:
    """Copy the last row."""
    count = token_count(None)

    def body(x: Buffer, y: Buffer) -> None:
        for_each(columns, lambda column: store(y, x[count - 1, column], 0, column))

    return build([("x", (count, columns), "float32"), ("y", (1, columns), "float32")], body)


def embedding(rows: int, columns: int, dtype: str, tokens: int | None) -> PrimFunc:
    """Look up ids in a float table."""
    count = token_count(tokens)
    parameters = [
        ("ids", (count,), "int32"),
        ("table", (rows, columns), dtype),
        ("y", (count, columns), "float32"),
    ]

    def body(ids: Buffer, table: Buffer, y: Buffer) -> None:
        def compute(index: Expr) -> None:
            token, column = _divmod(index, columns)
            store(y, cast(table[ids[token], column], "float32"), token, column)

        for_each(count * columns, compute)

    return build(parameters, body)


def embedding_nbits(table: Matrix, tokens: int | None) -> PrimFunc:
    """Look up ids in an n-bit table; a thread dequantizes 32 columns."""
    count, chunk_count = token_count(tokens), table.columns // COLUMNS
    parameters = [
        ("ids", (count,), "int32"),
        *table.parameters("table"),
        ("y", (count, table.columns), "float32"),
    ]

    def body(ids: Buffer, *rest: Buffer) -> None:
        *constants, y = rest

        def dequantize_chunk(index: Expr) -> None:
            token, chunk_index = _divmod(index, chunk_count)
            group, chunk = _divmod(chunk_index, table.chunks)

            def write(row: Row) -> None:
                zero, scale = bind(row.zero(group)), bind(row.scale(group))
                for quad in range(8):
                    word = bind(row.quad(group, chunk, quad))
                    for byte in range(4):
                        value = cast(extract_code(word, byte) - zero, "float32") * scale
                        store(y, value, token, chunk_index * COLUMNS + 4 * quad + byte)

            emit_for_row(table, constants, bind(ids[token]), write)

        for_each(count * chunk_count, dequantize_chunk)

    return build(parameters, body)


def gated_short_conv(
    size: int, taps: int, dtype: str, tokens: int | None, *, bias: str | None
) -> PrimFunc:
    """Compute the gated short convolution: one thread per channel, token by token."""
    count, state_rows = token_count(tokens), taps - 1
    parameters: list[Parameter] = [
        ("bcx", (count, 3 * size), "float32"),
        ("taps", (taps, size), dtype),
    ]
    if bias:
        parameters.append(("bias", (size,), bias))
    parameters += [("state", (state_rows, size), "float32"), ("y", (count, size), "float32")]

    def body(bcx: Buffer, weight: Buffer, *rest: Buffer) -> None:
        *bias_buffers, state, y = rest

        def compute(channel: Expr) -> None:
            window, filtered = alloc_local(taps), alloc_local(1)
            for tap in range(state_rows):
                store(window, state[tap, channel], tap)
            with T.serial(0, count) as token:
                store(window, bcx[token, channel] * bcx[token, 2 * size + channel], state_rows)
                initial = (
                    cast(bias_buffers[0][channel], "float32")
                    if bias
                    else tirx.const(0.0, "float32")
                )
                store(filtered, initial, 0)
                for tap in range(taps):
                    store(
                        filtered,
                        filtered[0] + window[tap] * cast(weight[tap, channel], "float32"),
                        0,
                    )
                store(y, bcx[token, size + channel] * filtered[0], token, channel)
                for tap in range(state_rows):
                    store(window, bind(window[tap + 1]), tap)
            for tap in range(state_rows):
                store(state, window[tap], tap, channel)

        for_each(size, compute)

    return build(parameters, body)


def angles(dim: int, tokens: int | None) -> PrimFunc:
    """Compute cosines and sines of the rotary angles."""
    count, half = token_count(tokens), dim // 2
    parameters = [
        ("start", (1,), "int32"),
        ("steps", (half,), "float32"),
        ("cos", (count, dim), "float32"),
        ("sin", (count, dim), "float32"),
    ]

    def body(start: Buffer, steps: Buffer, cos: Buffer, sin: Buffer) -> None:
        def compute(index: Expr) -> None:
            token, column = _divmod(index, half)
            angle = bind(cast(start[0] + token, "float32") * steps[column])
            for table, value in ((cos, bind(tirx.cos(angle))), (sin, bind(tirx.sin(angle)))):
                store(table, value, token, column)
                store(table, value, token, column + half)

        for_each(count * half, compute)

    return build(parameters, body)


def combine(size: int, top_k: int, tokens: int | None) -> PrimFunc:
    """Sum the results of the slots of each token, weighted by shares."""
    count = token_count(tokens)
    parameters = [
        ("shares", (count, top_k), "float32"),
        ("x", (count * top_k, size), "float32"),
        ("y", (count, size), "float32"),
    ]

    def body(shares: Buffer, x: Buffer, y: Buffer) -> None:
        def compute(index: Expr) -> None:
            token, column = _divmod(index, size)
            total = tirx.const(0.0, "float32")
            for slot in range(top_k):
                total = total + x[token * top_k + slot, column] * shares[token, slot]
            store(y, total, token, column)

        for_each(count * size, compute)

    return build(parameters, body)
