"""`silu(gate) * up`."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Columns,
    Expr,
    PrimFunc,
    bind,
    build,
    put,
    side_by_side,
    sigmoid,
    tokens_of,
    vector,
)


def swiglu(gate: Columns, up: Columns, tokens: int | None) -> PrimFunc:
    """Of two values that hold gate and up among their columns: `[T, I]`."""
    count = tokens_of(tokens)
    parameters = [
        ("gate", (count, gate.width), "float32"),
        ("up", (count, up.width), "float32"),
        ("y", (count, gate.size), "float32"),
    ]

    def body(first: Buffer, second: Buffer, y: Buffer) -> None:
        with side_by_side(count, tokens) as token, T.serial(0, gate.size // LANES) as block:
            at = block * LANES
            left = vector(first, token, gate.start + at)
            put(y, gated(left, vector(second, token, up.start + at)), token, at)

    return build(parameters, body)


def gated(gate: Expr, up: Expr) -> Expr:
    gate = bind(gate)
    return gate * sigmoid(gate) * up
