"""Products with matrices: a block is 16 rows by 16 threads, each with every 16th group."""

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
    divided,
    reduce,
    shared,
    strided,
    sync,
)
from lfmc.targets.tvm.kernels.layout import COLUMNS
from lfmc.targets.tvm.kernels.matrix import Activations, sized
from lfmc.targets.tvm.kernels.row import Row, code_of, in_block_or_tail

SPLITS = THREADS // ROWS
TILE = 4  # tokens that a block takes together
NARROW = 64  # threads of a product with one row of floats


def linear(
    format: Format, tail: int, device: object, tokens: int | None, *, bias: str | None, exact: bool
) -> PrimFunc:
    count, matrix = tokens_of(tokens), sized(format, tail, exact=True)
    held = matrix.parameters("w")
    parameters = [*Activations.parameters(matrix, count, True), *held]
    if bias:
        parameters.append(("bias", (matrix.rows,), bias))
    parameters.append(("y", (count, matrix.rows), "float32"))
    tile = 1 if tokens == 1 else TILE

    def body(x: Buffer, *rest: Buffer) -> None:
        constants, y = rest[: len(held)], rest[-1]
        grid = matrix.blocks + (1 if tail else 0), divided(count, tile)
        with blocks(*grid) as (block, first, thread):
            lane, row = _lane_and_row(block, thread)
            chosen = [bind(tirx.min(first * tile + m, count - 1)) for m in range(tile)]

            def use(own: Row) -> None:
                add_products(own, x, chosen, thread, sums)

            sums = cleared(tile)
            with T.If(row < matrix.rows), T.Then():
                in_block_or_tail(matrix, constants, row, use)

            def write(m: int, value: Expr) -> None:
                whole = value + cast(rest[len(held)][row], "float32") if bias else value
                with T.If(first * tile + m < count), T.Then():
                    put(y, whole, chosen[m], row)

            finish(sums, tile, lane, thread, row < matrix.rows, write)

    return build(parameters, body)


def _lane_and_row(block: Expr, thread: Expr) -> tuple[Expr, Expr]:
    lane = bind(tirx.floormod(thread, ROWS))
    return lane, bind(block * ROWS + lane)


def cleared(size: int) -> Buffer:
    found = local(size)
    for index in range(size):
        put(found, tirx.const(0.0, "float32"), index)
    return found


def add_products(row: Row, x: Buffer, tokens: list[Expr], thread: Expr, sums: Buffer) -> None:
    """Add a thread's share of the products of a row with some tokens."""
    m, split = row.matrix, bind(tirx.floordiv(thread, ROWS))
    with T.serial(0, divided(m.groups, SPLITS)) as step:
        group = bind(step * SPLITS + split)
        with T.If(group < m.groups), T.Then():
            own = cleared(len(tokens))
            zero = bind(row.zero(group))
            with T.serial(0, m.chunks) as chunk:
                for quad in range(8):
                    word = bind(row.quad(group, chunk, quad))
                    for byte in range(4):
                        weight = bind(cast(code_of(word, byte) - zero, "float32"))
                        column = (group * m.chunks + chunk) * COLUMNS + 4 * quad + byte
                        for index, token in enumerate(tokens):
                            put(own, own[index] + weight * x[token, column], index)
            scale = bind(row.scale(group))
            for index in range(len(tokens)):
                put(sums, sums[index] + own[index] * scale, index)


def finish(
    sums: Buffer,
    tile: int,
    lane: Expr,
    thread: Expr,
    valid: Expr,
    write: Callable[[int, Expr], None],
) -> None:
    """Add up what the threads of a row have, and let one of them write it."""
    held = shared(tile * THREADS)
    for index in range(tile):
        put(held, sums[index], index * THREADS + thread)
    sync()
    with T.If(tirx.And(thread < ROWS, valid)), T.Then():
        for index in range(tile):
            total = held[index * THREADS + lane]
            for split in range(1, SPLITS):
                total = total + held[index * THREADS + split * ROWS + lane]
            write(index, bind(total))
    sync()


def float_linear(
    rows: int, columns: int, dtype: str, tokens: int | None, *, bias: str | None
) -> PrimFunc:
    count = tokens_of(tokens)
    parameters: list[Parameter] = [
        ("x", (count, columns), "float32"),
        ("w", (rows, columns), dtype),
    ]
    if bias:
        parameters.append(("bias", (rows,), bias))
    parameters.append(("y", (count, rows), "float32"))

    def body(x: Buffer, w: Buffer, *rest: Buffer) -> None:
        with blocks(rows, count, threads=NARROW) as (row, token, thread):
            total = float_product(
                lambda at: x[token, at] * cast(w[row, at], "float32"), columns, thread
            )
            with T.If(thread < 1), T.Then():
                value = total + cast(rest[0][row], "float32") if bias else total
                put(rest[-1], value, token, row)

    return build(parameters, body)


def float_product(term: Callable[[Expr], Expr], columns: int, thread: Expr) -> Expr:
    """The sum of terms, by all threads of a narrow block."""
    sums, held = cleared(1), shared(NARROW)
    strided(columns, thread, lambda at: put(sums, sums[0] + term(at), 0), NARROW)
    return reduce(held, thread, sums[0], add, NARROW)
