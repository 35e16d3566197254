"""Activations rounded to int8, every group of columns of a row with a step of its own."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    PrimFunc,
    bind,
    build,
    cast,
    highest,
    like,
    local,
    put,
    side_by_side,
    tokens_of,
    total,
    vector,
    wide,
)


def round_rows(columns: int, group: int, tokens: int | None) -> PrimFunc:
    """Float32 `x` `[T, K]` as `round(x * (127 / max))` of each group: four int8 in an int32
    `[T, K / 4]`, steps `max / 127` float32 `[T, G]`, and sums of the codes int32 `[T, G]`."""
    count, groups = tokens_of(tokens), columns // group
    parameters = [
        ("x", (count, columns), "float32"),
        ("codes", (count, columns // 4), "int32"),
        ("steps", (count, groups), "float32"),
        ("sums", (count, groups), "int32"),
    ]

    def body(x: Buffer, codes: Buffer, steps: Buffer, sums: Buffer) -> None:
        with side_by_side(count, tokens) as token, T.serial(0, groups) as index:
            _round(x, group, token, index, codes, steps, sums)

    return build(parameters, body)


def _round(
    x: Buffer, group: int, token: Expr, index: Expr, codes: Buffer, steps: Buffer, sums: Buffer
) -> None:
    values, most = local(group), local(LANES)
    for at in range(0, group, LANES):
        put(values, vector(x, token, index * group + at), at)
    for at in range(0, group, LANES):
        size = tirx.abs(vector(values, at))
        put(most, size if at == 0 else tirx.max(vector(most, 0), size), 0)
    peak = bind(highest(most))
    safe = tirx.Select(peak > like(0.0, peak), peak, like(1.0, peak))
    factor = bind(tirx.Select(peak > like(0.0, peak), like(127.0, peak) / safe, like(0.0, peak)))
    put(steps, peak / like(127.0, peak), token, index)
    codes_sum = local(LANES, "int32")
    for at in range(0, group, LANES):
        whole = bind(cast(tirx.nearbyint(vector(values, at) * wide(factor)), "int32"))
        put(codes_sum, whole if at == 0 else vector(codes_sum, 0) + whole, 0)
        packed = tirx.reinterpret("int32x4", cast(whole, "int8"))
        put(codes, packed, token, index * (group // 4) + at // 4)
    put(sums, total(codes_sum), token, index)
