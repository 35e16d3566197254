"""Products with a float matrix."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    Parameter,
    PrimFunc,
    alloc_local,
    broadcast,
    build,
    cast,
    store,
    sum_lanes,
    token_count,
    vector,
)


def float_linear(
    rows: int, columns: int, dtype: str, tokens: int | None, *, bias: str | None
) -> PrimFunc:
    """Compute `y = x W^T + b`: `x` float32 `[T, K]`, `W` `[N, K]` of `dtype`, and `b` `[N]` of
    dtype `bias`, or no bias if `bias` is None."""
    count = token_count(tokens)
    parameters: list[Parameter] = [
        ("x", (count, columns), "float32"),
        ("w", (rows, columns), dtype),
    ]
    if bias:
        parameters.append(("bias", (rows,), bias))
    parameters.append(("y", (count, rows), "float32"))

    def body(x: Buffer, w: Buffer, *rest: Buffer) -> None:
        y = rest[-1]
        with T.parallel(0, rows) as row, T.serial(0, count) as token:
            value = row_product(
                lambda column: vector(x, token, column),
                lambda column: vector(w, row, column),
                columns,
            )
            store(y, value + cast(rest[0][row], "float32") if bias else value, token, row)

    return build(parameters, body)


def row_product(x: Callable[[Expr], Expr], w: Callable[[Expr], Expr], columns: int) -> Expr:
    """Return the dot product of two rows; `x(at)` and `w(at)` load 16 numbers."""
    sums = alloc_local(LANES)
    store(sums, broadcast(0.0), 0)
    with T.serial(0, columns // LANES) as block:
        column = block * LANES
        store(sums, vector(sums, 0) + x(column) * cast(w(column), "float32"), 0)
    return sum_lanes(sums)
