"""RMSNorm of every token, alone or behind the addition of a residual."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    Parameter,
    PrimFunc,
    bind,
    build,
    floats,
    local,
    put,
    side_by_side,
    tokens_of,
    total,
    vector,
    wide,
)


def norm_parameters(columns: int, dtype: str, count: Expr) -> list[Parameter]:
    """Of `rms_norm`, on every device."""
    return [
        ("x", (count, columns), "float32"),
        ("weight", (columns,), dtype),
        ("y", (count, columns), "float32"),
    ]


def add_norm_parameters(columns: int, dtype: str, count: Expr) -> list[Parameter]:
    """Of `add_rms_norm`, on every device."""
    shape = (count, columns)
    return [
        ("x", shape, "float32"),
        ("residual", shape, "float32"),
        ("weight", (columns,), dtype),
        ("y", shape, "float32"),
        ("sum", shape, "float32"),
    ]


def rms_norm(columns: int, dtype: str, eps: float, tokens: int | None) -> PrimFunc:
    """`weight * x / sqrt(mean(x^2) + eps)`: float32 `[T, H]` and `[H]` of `dtype`;
    result `[T, H]`."""
    count = tokens_of(tokens)
    parameters = norm_parameters(columns, dtype, count)

    def body(x: Buffer, weight: Buffer, y: Buffer) -> None:
        with side_by_side(count, tokens) as token:
            normalize(x, token, 0, weight, columns, eps, y, token, 0)

    return build(parameters, body)


def add_rms_norm(columns: int, dtype: str, eps: float, tokens: int | None) -> PrimFunc:
    """The norm of `residual + x`, and the sum itself: `[T, H]` each."""
    count = tokens_of(tokens)
    parameters = add_norm_parameters(columns, dtype, count)

    def body(x: Buffer, residual: Buffer, weight: Buffer, y: Buffer, added: Buffer) -> None:
        with side_by_side(count, tokens) as token:
            with T.serial(0, columns // LANES) as index:
                at = index * LANES
                put(added, vector(residual, token, at) + vector(x, token, at), token, at)
            normalize(added, token, 0, weight, columns, eps, y, token, 0)

    return build(parameters, body)


def normalize(
    x: Buffer,
    row: Expr,
    start: Expr,
    weight: Buffer,
    columns: int,
    eps: float,
    y: Buffer,
    to_row: Expr,
    to: Expr,
) -> None:
    """`columns` numbers of a row of `x` from `start` on, into a row of `y`."""
    squares = local(LANES)
    put(squares, wide(0.0), 0)
    with T.serial(0, columns // LANES) as index:
        value = bind(vector(x, row, start + index * LANES))
        put(squares, vector(squares, 0) + value * value, 0)
    mean = total(squares) / tirx.const(float(columns), "float32")
    factor = bind(tirx.const(1.0, "float32") / tirx.sqrt(mean + tirx.const(eps, "float32")))
    with T.serial(0, columns // LANES) as index:
        at = index * LANES
        value = vector(x, row, start + at) * wide(factor) * floats(weight, at)
        put(y, value, to_row, to + at)
