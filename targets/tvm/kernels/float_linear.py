"""Products with a matrix that stays float."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    Parameter,
    PrimFunc,
    build,
    cast,
    local,
    put,
    tokens_of,
    total,
    vector,
    wide,
)


def float_linear(
    rows: int, columns: int, dtype: str, tokens: int | None, *, bias: str | None
) -> PrimFunc:
    """`y = x W^T + b`: float32 `[T, K]`, `[N, K]` of `dtype`, `[N]` of dtype `bias` where there is
    one."""
    count = tokens_of(tokens)
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
                lambda at: vector(x, token, at), lambda at: vector(w, row, at), columns
            )
            put(y, value + cast(rest[0][row], "float32") if bias else value, token, row)

    return build(parameters, body)


def row_product(x: object, w: object, columns: int) -> Expr:
    """The sum of products of two rows, of which `x(at)` and `w(at)` give 16 numbers."""
    sums = local(LANES)
    put(sums, wide(0.0), 0)
    with T.serial(0, columns // LANES) as block:
        at = block * LANES
        put(sums, vector(sums, 0) + x(at) * cast(w(at), "float32"), 0)  # type: ignore[operator]
    return total(sums)
