"""SwiGLU: `silu(gate) * up`."""

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
    maybe_parallel,
    sigmoid,
    store,
    token_count,
    vector,
)


def swiglu(gate: Columns, up: Columns, tokens: int | None) -> PrimFunc:
    """Compute SwiGLU of two tensors whose columns include gate and up: `[T, I]`."""
    count = token_count(tokens)
    parameters = [
        ("gate", (count, gate.width), "float32"),
        ("up", (count, up.width), "float32"),
        ("y", (count, gate.size), "float32"),
    ]

    def body(gate_buffer: Buffer, up_buffer: Buffer, y: Buffer) -> None:
        with maybe_parallel(count, tokens) as token, T.serial(0, gate.size // LANES) as block:
            column = block * LANES
            gate_vector = vector(gate_buffer, token, gate.start + column)
            store(y, gated(gate_vector, vector(up_buffer, token, up.start + column)), token, column)

    return build(parameters, body)


def gated(gate: Expr, up: Expr) -> Expr:
    """Return `silu(gate) * up`."""
    gate = bind(gate)
    return gate * sigmoid(gate) * up
