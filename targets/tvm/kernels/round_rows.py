"""Rounding of activations to int8, with one step for every group of columns of a row."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    PrimFunc,
    alloc_local,
    bind,
    broadcast,
    build,
    cast,
    const_like,
    max_lanes,
    maybe_parallel,
    store,
    sum_lanes,
    token_count,
    vector,
)


def round_rows(columns: int, group: int, tokens: int | None) -> PrimFunc:
    """Round float32 `x` `[T, K]` to `round(x * (127 / max))` in each group. Results: four int8 in
    an int32 `[T, K / 4]`, steps `max / 127` float32 `[T, G]`, and sums of the codes int32 `[T, G]`.
    """
    count, groups = token_count(tokens), columns // group
    parameters = [
        ("x", (count, columns), "float32"),
        ("codes", (count, columns // 4), "int32"),
        ("steps", (count, groups), "float32"),
        ("sums", (count, groups), "int32"),
    ]

    def body(x: Buffer, codes: Buffer, steps: Buffer, sums: Buffer) -> None:
        with maybe_parallel(count, tokens) as token, T.serial(0, groups) as group_index:
            _round(x, group, token, group_index, codes, steps, sums)

    return build(parameters, body)


def _round(
    x: Buffer,
    group: int,
    token: Expr,
    group_index: Expr,
    codes: Buffer,
    steps: Buffer,
    sums: Buffer,
) -> None:
    """Round one group of one token."""
    values, maxima = alloc_local(group), alloc_local(LANES)
    for column in range(0, group, LANES):
        store(values, vector(x, token, group_index * group + column), column)
    for column in range(0, group, LANES):
        magnitude = tirx.abs(vector(values, column))
        store(maxima, magnitude if column == 0 else tirx.max(vector(maxima, 0), magnitude), 0)
    maximum = bind(max_lanes(maxima))
    divisor = tirx.Select(maximum > const_like(0.0, maximum), maximum, const_like(1.0, maximum))
    factor = bind(
        tirx.Select(
            maximum > const_like(0.0, maximum),
            const_like(127.0, maximum) / divisor,
            const_like(0.0, maximum),
        )
    )
    store(steps, maximum / const_like(127.0, maximum), token, group_index)
    codes_sum = alloc_local(LANES, "int32")
    for column in range(0, group, LANES):
        rounded = bind(cast(tirx.nearbyint(vector(values, column) * broadcast(factor)), "int32"))
        store(codes_sum, rounded if column == 0 else vector(codes_sum, 0) + rounded, 0)
        packed = tirx.reinterpret("int32x4", cast(rounded, "int8"))
        store(codes, packed, token, group_index * (group // 4) + column // 4)
    store(sums, sum_lanes(codes_sum), token, group_index)
