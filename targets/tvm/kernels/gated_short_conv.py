"""The gated short convolution with its state, in one pass: gate, filter, gate."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Parameter,
    PrimFunc,
    alloc_local,
    bind,
    build,
    float_vector,
    maybe_parallel,
    store,
    token_count,
    vector,
)


def gated_short_conv(
    size: int, taps: int, dtype: str, tokens: int | None, *, bias: str | None
) -> PrimFunc:
    """Compute `C * filter(B * x)`.

    Inputs: `bcx` `[T, 3H]`, taps `[taps, H]` of `dtype`, and a bias `[H]` of dtype `bias` unless
    `bias` is None. The state, updated in place, is the last `taps - 1` inputs of the filter `[taps
    - 1, H]`. Result: `[T, H]`.

    Channels run in parallel and tokens one after the other: the inputs in the window of the filter
    stay in registers.
    """
    count = token_count(tokens)
    state_rows = taps - 1
    parameters: list[Parameter] = [
        ("bcx", (count, 3 * size), "float32"),
        ("taps", (taps, size), dtype),
    ]
    if bias:
        parameters.append(("bias", (size,), bias))
    parameters += [("state", (state_rows, size), "float32"), ("y", (count, size), "float32")]

    def body(bcx: Buffer, weight: Buffer, *rest: Buffer) -> None:
        *bias_buffers, state, y = rest
        with maybe_parallel(size // LANES, tokens) as block:
            channel = block * LANES
            window = alloc_local(taps * LANES)
            for tap in range(state_rows):
                store(window, vector(state, tap, channel), tap * LANES)
            with T.serial(0, count) as token:
                gated = vector(bcx, token, channel) * vector(bcx, token, 2 * size + channel)
                store(window, gated, state_rows * LANES)
                filtered = float_vector(bias_buffers[0], channel) if bias else None
                for tap in range(taps):
                    term = vector(window, tap * LANES) * float_vector(weight, tap, channel)
                    filtered = term if filtered is None else filtered + term
                store(y, vector(bcx, token, size + channel) * filtered, token, channel)
                for tap in range(state_rows):
                    store(window, bind(vector(window, (tap + 1) * LANES)), tap * LANES)
            for tap in range(state_rows):
                store(state, vector(window, tap * LANES), tap, channel)

    return build(parameters, body)
