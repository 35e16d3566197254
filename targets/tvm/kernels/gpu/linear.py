"""Products with matrices. A block is 16 rows by 16 threads; a thread takes every 16th group."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.calib_free.grid.formats import Format
from lfmc.targets.shared.row_blocks import ROWS
from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Expr,
    Parameter,
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
    ceildiv,
    reduce,
    strided_loop,
    sync,
    thread_blocks,
)
from lfmc.targets.tvm.kernels.layout import COLUMNS
from lfmc.targets.tvm.kernels.matrix import Activations, dynamic_matrix
from lfmc.targets.tvm.kernels.row import Row, emit_for_row, extract_code

SPLITS = THREADS // ROWS
TILE = 4  # tokens that a block multiplies together
NARROW_THREADS = 64  # threads of a block that multiplies one float row


def linear(
    format: Format, tail: int, device: object, tokens: int | None, *, bias: str | None, exact: bool
) -> PrimFunc:
    """Compute `y = x W^T + b` with an n-bit matrix, like the CPU kernel, with float activations."""
    count, matrix = token_count(tokens), dynamic_matrix(format, tail, exact=True)
    matrix_parameters = matrix.parameters("w")
    parameters = [*Activations.parameters(matrix, count, True), *matrix_parameters]
    if bias:
        parameters.append(("bias", (matrix.rows,), bias))
    parameters.append(("y", (count, matrix.rows), "float32"))
    tile = 1 if tokens == 1 else TILE

    def body(x: Buffer, *rest: Buffer) -> None:
        constants, y = rest[: len(matrix_parameters)], rest[-1]
        grid = matrix.blocks + (1 if tail else 0), ceildiv(count, tile)
        with thread_blocks(*grid) as (block, first, thread):
            lane, row = _lane_and_row(block, thread)
            token_tile = [bind(tirx.min(first * tile + index, count - 1)) for index in range(tile)]

            def add_row(matrix_row: Row) -> None:
                add_products(matrix_row, x, token_tile, thread, sums)

            sums = alloc_zeros(tile)
            with T.If(row < matrix.rows), T.Then():
                emit_for_row(matrix, constants, row, add_row)

            def write(index: int, value: Expr) -> None:
                result = (
                    value + cast(rest[len(matrix_parameters)][row], "float32") if bias else value
                )
                with T.If(first * tile + index < count), T.Then():
                    store(y, result, token_tile[index], row)

            reduce_and_write(sums, tile, lane, thread, row < matrix.rows, write)

    return build(parameters, body)


def _lane_and_row(block: Expr, thread: Expr) -> tuple[Expr, Expr]:
    lane = bind(tirx.floormod(thread, ROWS))
    return lane, bind(block * ROWS + lane)


def alloc_zeros(size: int) -> Buffer:
    """Allocate a local array of zeros, float32."""
    buffer = alloc_local(size)
    for index in range(size):
        store(buffer, tirx.const(0.0, "float32"), index)
    return buffer


def add_products(row: Row, x: Buffer, tokens: list[Expr], thread: Expr, sums: Buffer) -> None:
    """Add a thread's part of the products of a row with some tokens to `sums`."""
    matrix, split = row.matrix, bind(tirx.floordiv(thread, ROWS))
    with T.serial(0, ceildiv(matrix.groups, SPLITS)) as step:
        group = bind(step * SPLITS + split)
        with T.If(group < matrix.groups), T.Then():
            group_sums = alloc_zeros(len(tokens))
            zero = bind(row.zero(group))
            with T.serial(0, matrix.chunks) as chunk:
                for quad in range(8):
                    word = bind(row.quad(group, chunk, quad))
                    for byte in range(4):
                        weight = bind(cast(extract_code(word, byte) - zero, "float32"))
                        column = (group * matrix.chunks + chunk) * COLUMNS + 4 * quad + byte
                        for index, token in enumerate(tokens):
                            store(group_sums, group_sums[index] + weight * x[token, column], index)
            scale = bind(row.scale(group))
            for index in range(len(tokens)):
                store(sums, sums[index] + group_sums[index] * scale, index)


def reduce_and_write(
    sums: Buffer,
    tile: int,
    lane: Expr,
    thread: Expr,
    valid: Expr,
    write: Callable[[int, Expr], None],
) -> None:
    """Add the sums of the threads of a row, and have one thread write the result."""
    scratch = alloc_shared(tile * THREADS)
    for index in range(tile):
        store(scratch, sums[index], index * THREADS + thread)
    sync()
    with T.If(tirx.And(thread < ROWS, valid)), T.Then():
        for index in range(tile):
            total = scratch[index * THREADS + lane]
            for split in range(1, SPLITS):
                total = total + scratch[index * THREADS + split * ROWS + lane]
            write(index, bind(total))
    sync()


def float_linear(
    rows: int, columns: int, dtype: str, tokens: int | None, *, bias: str | None
) -> PrimFunc:
    """Compute `y = x W^T + b` with a float matrix."""
    count = token_count(tokens)
    parameters: list[Parameter] = [
        ("x", (count, columns), "float32"),
        ("w", (rows, columns), dtype),
    ]
    if bias:
        parameters.append(("bias", (rows,), bias))
    parameters.append(("y", (count, rows), "float32"))

    def body(x: Buffer, w: Buffer, *rest: Buffer) -> None:
        with thread_blocks(rows, count, threads=NARROW_THREADS) as (row, token, thread):
            total = float_product(
                lambda column: x[token, column] * cast(w[row, column], "float32"), columns, thread
            )
            with T.If(thread < 1), T.Then():
                value = total + cast(rest[0][row], "float32") if bias else total
                store(rest[-1], value, token, row)

    return build(parameters, body)


def float_product(term: Callable[[Expr], Expr], columns: int, thread: Expr) -> Expr:
    """Return the sum of `term` over columns, computed by all threads of a narrow block."""
    sums, scratch = alloc_zeros(1), alloc_shared(NARROW_THREADS)
    strided_loop(
        columns, thread, lambda column: store(sums, sums[0] + term(column), 0), NARROW_THREADS
    )
    return reduce(scratch, thread, sums[0], add, NARROW_THREADS)
