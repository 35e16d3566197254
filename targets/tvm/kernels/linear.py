"""Products with an n-bit matrix: of one token (a GEMV), or of many tokens (a GEMM)."""

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
    float_vector,
    store,
    token_count,
)
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix, dynamic_matrix
from lfmc.targets.tvm.kernels.products import RowBlock, multiply
from lfmc.targets.tvm.kernels.row import Row, multiply_row


def linear(
    format: Format, tail: int, cpu: Cpu, tokens: int | None, *, bias: str | None, exact: bool
) -> PrimFunc:
    """Compute `y = x W^T + b`. Inputs: activations (see `Activations`), the constants of the
    matrix, and the bias `[N]` of dtype `bias` unless `bias` is None; result float32 `[T, N]`.
    `tail` is `N` modulo 16."""
    count, matrix = token_count(tokens), dynamic_matrix(format, tail, exact=exact)
    activation_parameters = Activations.parameters(matrix, count, exact)
    matrix_parameters = matrix.parameters("w")
    parameters = [*activation_parameters, *matrix_parameters]
    if bias:
        parameters.append(("bias", (matrix.rows,), bias))
    parameters.append(("y", (count, matrix.rows), "float32"))

    def body(*buffers: Buffer) -> None:
        x, constants = (
            Activations(buffers[: len(activation_parameters)]),
            buffers[len(activation_parameters) :][: len(matrix_parameters)],
        )
        bias_buffer, y = buffers[-2] if bias else None, buffers[-1]
        with T.parallel(0, matrix.blocks) as block:
            row_block = RowBlock(matrix, constants, block)
            _multiply_block(row_block, x, count, tokens, cpu, bias_buffer, y, exact)
        if tail:
            _multiply_tail(matrix, constants, x, count, bias_buffer, y, exact)

    return build(parameters, body)


def _multiply_block(
    row_block: RowBlock,
    x: Activations,
    count: Expr,
    tokens: int | None,
    cpu: Cpu,
    bias: Buffer | None,
    y: Buffer,
    exact: bool,
) -> None:
    """Multiply a block of rows with all tokens: whole tiles of tokens, then the remaining tokens
    one by one."""

    def write(token_tile: list[Expr]) -> None:
        column = row_block.block * ROWS
        readers = multiply(row_block, x, token_tile, cpu, exact=exact)
        for token, read_result in zip(token_tile, readers, strict=True):
            value = read_result()
            store(y, value if bias is None else value + float_vector(bias, column), token, column)

    if tokens == 1:
        write([0])
        return
    tile = 1 if exact else cpu.tile
    whole_tiles = tirx.floordiv(count, tile)
    with T.serial(0, whole_tiles) as index:
        write([index * tile + offset for offset in range(tile)])
    if tile > 1:
        with T.serial(0, count - whole_tiles * tile) as token:
            write([whole_tiles * tile + token])


def _multiply_tail(
    matrix: Matrix,
    constants: tuple[Buffer, ...],
    x: Activations,
    count: Expr,
    bias: Buffer | None,
    y: Buffer,
    exact: bool,
) -> None:
    """Multiply the rows behind the whole blocks with all tokens."""
    with T.serial(0, count) as token, T.serial(0, matrix.tail) as row:
        tail_row = Row(matrix, constants, matrix.blocks, row, in_tail=True)
        value = multiply_row(tail_row, x, token, exact=exact)
        column = matrix.blocks * ROWS + row
        store(y, value if bias is None else value + cast(bias[column], "float32"), token, column)
