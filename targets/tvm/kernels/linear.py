"""Products with an n-bit matrix: of one token (a GEMV), or of many (a GEMM)."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.calib_free.grid.formats import Format
from lfmc.targets.shared.row_blocks import ROWS
from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Expr,
    PrimFunc,
    build,
    cast,
    floats,
    put,
    tokens_of,
)
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix, sized
from lfmc.targets.tvm.kernels.products import Rows, multiply
from lfmc.targets.tvm.kernels.row import Row, multiply_row


def linear(
    format: Format, tail: int, cpu: Cpu, tokens: int | None, *, bias: str | None, exact: bool
) -> PrimFunc:
    """`y = x W^T + b`: activations (see `Activations`), the matrix's constants, the bias `[N]`
    of that dtype where there is one; result float32 `[T, N]`. `tail`
    is what `N` leaves, divided by 16."""
    count, matrix = tokens_of(tokens), sized(format, tail, exact=exact)
    given = Activations.parameters(matrix, count, exact)
    held = matrix.parameters("w")
    parameters = [*given, *held]
    if bias:
        parameters.append(("bias", (matrix.rows,), bias))
    parameters.append(("y", (count, matrix.rows), "float32"))

    def body(*buffers: Buffer) -> None:
        x, constants = Activations(buffers[: len(given)]), buffers[len(given) :][: len(held)]
        own_bias, y = buffers[-2] if bias else None, buffers[-1]
        with T.parallel(0, matrix.blocks) as block:
            rows = Rows(matrix, constants, block)
            _tiles(rows, x, count, tokens, cpu, own_bias, y, exact)
        if tail:
            _tail(matrix, constants, x, count, own_bias, y, exact)

    return build(parameters, body)


def _tiles(
    rows: Rows,
    x: Activations,
    count: Expr,
    tokens: int | None,
    cpu: Cpu,
    bias: Buffer | None,
    y: Buffer,
    exact: bool,
) -> None:
    """A block of rows with all tokens: so many at once, and what is left one by one."""

    def write(chosen: list[Expr]) -> None:
        column = rows.block * ROWS
        results = multiply(rows, x, chosen, cpu, exact=exact)
        for token, result in zip(chosen, results, strict=True):
            value = result()
            put(y, value if bias is None else value + floats(bias, column), token, column)

    if tokens == 1:
        write([0])
        return
    tile = 1 if exact else cpu.tile
    whole = tirx.floordiv(count, tile)
    with T.serial(0, whole) as index:
        write([index * tile + offset for offset in range(tile)])
    if tile > 1:
        with T.serial(0, count - whole * tile) as rest:
            write([whole * tile + rest])


def _tail(
    matrix: Matrix,
    constants: tuple[Buffer, ...],
    x: Activations,
    count: Expr,
    bias: Buffer | None,
    y: Buffer,
    exact: bool,
) -> None:
    with T.serial(0, count) as token, T.serial(0, matrix.tail) as row:
        own = Row(matrix, constants, matrix.blocks, row, in_tail=True)
        value = multiply_row(own, x, token, exact=exact)
        at = matrix.blocks * ROWS + row
        put(y, value if bias is None else value + cast(bias[at], "float32"), token, at)
