"""The gated short convolution with its state, in one pass: gate, filter, gate."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Parameter,
    PrimFunc,
    bind,
    build,
    floats,
    local,
    put,
    side_by_side,
    tokens_of,
    vector,
)


def gated_short_conv(
    size: int, taps: int, dtype: str, tokens: int | None, *, bias: str | None
) -> PrimFunc:
    """`C * filter(B * x)` for `bcx` `[T, 3H]`, taps `[taps, H]` of `dtype`, and `[H]` of
    dtype `bias` where there is one; the last `taps - 1` inputs of the filter `[taps - 1, H]`, in
    place; result `[T, H]`.

    Channels side by side, tokens one after the other: what the filter still sees stays in
    registers.
    """
    count = tokens_of(tokens)
    back = taps - 1
    parameters: list[Parameter] = [
        ("bcx", (count, 3 * size), "float32"),
        ("taps", (taps, size), dtype),
    ]
    if bias:
        parameters.append(("bias", (size,), bias))
    parameters += [("state", (back, size), "float32"), ("y", (count, size), "float32")]

    def body(bcx: Buffer, weight: Buffer, *rest: Buffer) -> None:
        *own_bias, state, y = rest
        with side_by_side(size // LANES, tokens) as block:
            at = block * LANES
            seen = local(taps * LANES)
            for tap in range(back):
                put(seen, vector(state, tap, at), tap * LANES)
            with T.serial(0, count) as token:
                gated = vector(bcx, token, at) * vector(bcx, token, 2 * size + at)
                put(seen, gated, back * LANES)
                mixed = floats(own_bias[0], at) if bias else None
                for tap in range(taps):
                    part = vector(seen, tap * LANES) * floats(weight, tap, at)
                    mixed = part if mixed is None else mixed + part
                put(y, vector(bcx, token, size + at) * mixed, token, at)
                for tap in range(back):
                    put(seen, bind(vector(seen, (tap + 1) * LANES)), tap * LANES)
            for tap in range(back):
                put(state, vector(seen, tap * LANES), tap, at)

    return build(parameters, body)
