"""RMSNorm: a block of threads a token."""

from __future__ import annotations

from tvm import tirx

from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Expr,
    PrimFunc,
    bind,
    build,
    cast,
    local,
    put,
    tokens_of,
)
from lfmc.targets.tvm.kernels.gpu.grid import (
    THREADS,
    add,
    blocks,
    reduce,
    shared,
    strided,
)
from lfmc.targets.tvm.kernels.rms_norm import add_norm_parameters, norm_parameters


def rms_norm(columns: int, dtype: str, eps: float, tokens: int | None) -> PrimFunc:
    count = tokens_of(tokens)
    parameters = norm_parameters(columns, dtype, count)

    def body(x: Buffer, weight: Buffer, y: Buffer) -> None:
        with blocks(count) as (token, thread):
            _normalize(x, token, thread, weight, columns, eps, y)

    return build(parameters, body)


def add_rms_norm(columns: int, dtype: str, eps: float, tokens: int | None) -> PrimFunc:
    count = tokens_of(tokens)
    parameters = add_norm_parameters(columns, dtype, count)

    def body(x: Buffer, residual: Buffer, weight: Buffer, y: Buffer, added: Buffer) -> None:
        with blocks(count) as (token, thread):
            # Each thread reads below what it wrote here itself.
            strided(
                columns,
                thread,
                lambda at: put(added, residual[token, at] + x[token, at], token, at),
            )
            _normalize(added, token, thread, weight, columns, eps, y)

    return build(parameters, body)


def _normalize(
    x: Buffer, token: Expr, thread: Expr, weight: Buffer, columns: int, eps: float, y: Buffer
) -> None:
    squares, held = local(1), shared(THREADS)
    put(squares, tirx.const(0.0, "float32"), 0)

    def square(at: Expr) -> None:
        value = bind(x[token, at])
        put(squares, squares[0] + value * value, 0)

    strided(columns, thread, square)
    total = reduce(held, thread, squares[0], add, THREADS)
    mean = total / tirx.const(float(columns), "float32")
    factor = bind(tirx.const(1.0, "float32") / tirx.sqrt(mean + tirx.const(eps, "float32")))

    def write(at: Expr) -> None:
        put(y, x[token, at] * factor * cast(weight[at], "float32"), token, at)

    strided(columns, thread, write)
