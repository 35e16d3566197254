"""RMSNorm of every token, alone or after the addition of a residual."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    Parameter,
    PrimFunc,
    alloc_local,
    bind,
    broadcast,
    build,
    float_vector,
    maybe_parallel,
    store,
    sum_lanes,
    token_count,
    vector,
)


def norm_parameters(columns: int, dtype: str, count: Expr) -> list[Parameter]:
    """Return the parameters of `rms_norm`, which are the same on every device."""
    return [
        ("x", (count, columns), "float32"),
        ("weight", (columns,), dtype),
        ("y", (count, columns), "float32"),
    ]


def add_norm_parameters(columns: int, dtype: str, count: Expr) -> list[Parameter]:
    """Return the parameters of `add_rms_norm`, which are the same on every device."""
    shape = (count, columns)
    return [
        ("x", shape, "float32"),
        ("residual", shape, "float32"),
        ("weight", (columns,), dtype),
        ("y", shape, "float32"),
        ("sum", shape, "float32"),
    ]


def rms_norm(columns: int, dtype: str, eps: float, tokens: int | None) -> PrimFunc:
    """Compute `weight * x / sqrt(mean(x^2) + eps)`: `x` float32 `[T, H]`, `weight` `[H]` of
    `dtype`; result `[T, H]`."""
    count = token_count(tokens)
    parameters = norm_parameters(columns, dtype, count)

    def body(x: Buffer, weight: Buffer, y: Buffer) -> None:
        with maybe_parallel(count, tokens) as token:
            normalize(x, token, 0, weight, columns, eps, y, token, 0)

    return build(parameters, body)


def add_rms_norm(columns: int, dtype: str, eps: float, tokens: int | None) -> PrimFunc:
    """Compute the norm of `residual + x`, and the sum itself: `[T, H]` each."""
    count = token_count(tokens)
    parameters = add_norm_parameters(columns, dtype, count)

    def body(x: Buffer, residual: Buffer, weight: Buffer, y: Buffer, added: Buffer) -> None:
        with maybe_parallel(count, tokens) as token:
            with T.serial(0, columns // LANES) as index:
                column = index * LANES
                store(
                    added, vector(residual, token, column) + vector(x, token, column), token, column
                )
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
    y_row: Expr,
    y_start: Expr,
) -> None:
    """Normalize `columns` numbers of a row of `x` from column `start` on, and store them in a row
    of `y`."""
    squares = alloc_local(LANES)
    store(squares, broadcast(0.0), 0)
    with T.serial(0, columns // LANES) as index:
        value = bind(vector(x, row, start + index * LANES))
        store(squares, vector(squares, 0) + value * value, 0)
    mean = sum_lanes(squares) / tirx.const(float(columns), "float32")
    factor = bind(tirx.const(1.0, "float32") / tirx.sqrt(mean + tirx.const(eps, "float32")))
    with T.serial(0, columns // LANES) as index:
        column = index * LANES
        value = vector(x, row, start + column) * broadcast(factor) * float_vector(weight, column)
        store(y, value, y_row, y_start + column)
