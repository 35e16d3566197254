"""RMSNorm on GPUs: a block of threads for each token."""

from __future__ import annotations

from tvm import tirx

from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Expr,
    PrimFunc,
    alloc_local,
    bind,
    build,
    cast,
    store,
    token_count,
)
from lfmc.targets.tvm.kernels.gpu.grid import (
    THREADS,
    add,
    alloc_shared,
    reduce,
    strided_loop,
    thread_blocks,
)
from lfmc.targets.tvm.kernels.rms_norm import add_norm_parameters, norm_parameters


def rms_norm(columns: int, dtype: str, eps: float, tokens: int | None) -> PrimFunc:
    """Normalize every token."""
    count = token_count(tokens)
    parameters = norm_parameters(columns, dtype, count)

    def body(x: Buffer, weight: Buffer, y: Buffer) -> None:
        with thread_blocks(count) as (token, thread):
            _normalize(x, token, thread, weight, columns, eps, y)

    return build(parameters, body)


def add_rms_norm(columns: int, dtype: str, eps: float, tokens: int | None) -> PrimFunc:
    """Add the residual, then normalize every token."""
    count = token_count(tokens)
    parameters = add_norm_parameters(columns, dtype, count)

    def body(x: Buffer, residual: Buffer, weight: Buffer, y: Buffer, added: Buffer) -> None:
        with thread_blocks(count) as (token, thread):
            # `_normalize` has each thread read only the elements that the same thread wrote here.
            strided_loop(
                columns,
                thread,
                lambda column: store(
                    added, residual[token, column] + x[token, column], token, column
                ),
            )
            _normalize(added, token, thread, weight, columns, eps, y)

    return build(parameters, body)


def _normalize(
    x: Buffer, token: Expr, thread: Expr, weight: Buffer, columns: int, eps: float, y: Buffer
) -> None:
    """Normalize one token of `x` into `y`."""
    squares, scratch = alloc_local(1), alloc_shared(THREADS)
    store(squares, tirx.const(0.0, "float32"), 0)

    def square(column: Expr) -> None:
        value = bind(x[token, column])
        store(squares, squares[0] + value * value, 0)

    strided_loop(columns, thread, square)
    total = reduce(scratch, thread, squares[0], add, THREADS)
    mean = total / tirx.const(float(columns), "float32")
    factor = bind(tirx.const(1.0, "float32") / tirx.sqrt(mean + tirx.const(eps, "float32")))

    def write(column: Expr) -> None:
        store(y, x[token, column] * factor * cast(weight[column], "float32"), token, column)

    strided_loop(columns, thread, write)
