"""Sparse experts: see `lfmc.targets.tvm.kernels.moe` and `routing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.calib_free.grid.formats import Format
from lfmc.targets.shared.row_blocks import ROWS
from lfmc.targets.tvm.kernels import routing as cpu
from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Expr,
    PrimFunc,
    bind,
    build,
    cast,
    dimension,
    local,
    put,
    tokens_of,
)
from lfmc.targets.tvm.kernels.gpu.grid import blocks
from lfmc.targets.tvm.kernels.gpu.linear import (
    NARROW,
    TILE,
    add_products,
    cleared,
    finish,
    float_product,
)
from lfmc.targets.tvm.kernels.matrix import Matrix, sized
from lfmc.targets.tvm.kernels.moe import Floats, Stack, beside, places
from lfmc.targets.tvm.kernels.row import Row
from lfmc.targets.tvm.kernels.swiglu import gated


def route(experts: int, top_k: int, normalize: bool, scale: float, tokens: int | None) -> PrimFunc:
    """By one thread: there is little to do."""
    with_one = lambda: blocks(1, threads=1)  # noqa: E731
    return cpu.route(experts, top_k, normalize, scale, tokens, around=with_one)


def group(experts: int, top_k: int, tokens: int | None) -> PrimFunc:
    """By one thread."""
    return cpu.group(experts, top_k, tokens, around=lambda: blocks(1, threads=1))


def gate_up(
    one: Stack, three: Stack, device: object, tokens: int | None, *, top_k: int, exact: bool
) -> PrimFunc:
    count = tokens_of(tokens)
    first = _matrix(one)
    second = beside(first, three)
    ones, threes = first.parameters("w1"), second.parameters("w3")
    parameters = [
        ("x", (count, first.columns), "float32"),
        *places(count * top_k),
        *ones,
        *threes,
        ("y", (count * top_k, first.rows), "float32"),
    ]

    def body(x: Buffer, order: Buffer, begins: Buffer, members: Buffer, *rest: Buffer) -> None:
        *constants, y = rest
        held = constants[: len(ones)], constants[len(ones) :]

        def row_of(place: Expr) -> Expr:
            return tirx.floordiv(order[place], top_k)

        def write(place: Expr, row: Expr, values: Sequence[Expr]) -> None:
            put(y, gated(*values), place, row)

        _each([(first, held[0]), (second, held[1])], x, begins, members, tokens, row_of, write)

    return build(parameters, body)


def down(two: Stack, device: object, tokens: int | None, *, top_k: int, exact: bool) -> PrimFunc:
    count = dimension("P") if tokens is None else tokens * top_k
    matrix = _matrix(two)
    parameters = [
        ("x", (count, matrix.columns), "float32"),
        *places(count),
        *matrix.parameters("w2"),
        ("y", (count, matrix.rows), "float32"),
    ]

    def body(x: Buffer, order: Buffer, begins: Buffer, members: Buffer, *rest: Buffer) -> None:
        *constants, y = rest

        def write(place: Expr, row: Expr, values: Sequence[Expr]) -> None:
            put(y, values[0], order[place], row)

        _each([(matrix, constants)], x, begins, members, tokens, lambda place: place, write)

    return build(parameters, body)


def _matrix(stack: Stack) -> Matrix | Floats:
    if isinstance(stack, Format):
        return sized(stack, 0, exact=True, count=dimension("M"))
    return stack


def _each(
    matrices: Sequence[tuple[Matrix | Floats, Sequence[Buffer]]],
    x: Buffer,
    begins: Buffer,
    members: Buffer,
    tokens: int | None,
    row_of: Callable[[Expr], Expr],
    write: Callable[[Expr, Expr, Sequence[Expr]], None],
) -> None:
    """Rows of every expert that is a member and was chosen, with its places."""
    matrix, experts = matrices[0][0], members.shape[0]
    if isinstance(matrix, Floats):
        _each_float(matrices, x, begins, members, row_of, write)
        return
    tile = 1 if tokens == 1 else TILE
    with blocks(matrix.blocks, experts) as (block, expert, thread):
        lane = bind(tirx.floormod(thread, ROWS))
        which, begin = bind(members[expert]), bind(begins[expert])
        count = bind(begins[expert + 1] - begin)
        turns = tirx.Select(which >= 0, tirx.floordiv(count + (tile - 1), tile), 0)
        with T.serial(0, bind(turns)) as turn:
            own = [bind(tirx.min(turn * tile + index, count - 1) + begin) for index in range(tile)]
            rows = [bind(row_of(place)) for place in own]
            found: list[list[Expr]] = [[] for _ in range(tile)]
            for index, (each, constants) in enumerate(matrices):
                assert isinstance(each, Matrix)
                sums = cleared(tile)
                add_products(Row(each, constants, block, lane, which), x, rows, thread, sums)

                def keep(m: int, value: Expr, last: bool = index == len(matrices) - 1) -> None:
                    found[m].append(value)
                    if last:
                        with T.If(turn * tile + m < count), T.Then():
                            write(own[m], block * ROWS + lane, found[m])

                # Results of the first matrix are kept in registers of the same thread.
                finish(sums, tile, lane, thread, thread < ROWS, _kept(found, keep, tile))


def _kept(
    found: list[list[Expr]], keep: Callable[[int, Expr], None], tile: int
) -> Callable[[int, Expr], None]:
    held = local(tile)

    def store(m: int, value: Expr) -> None:
        put(held, value, m)
        keep(m, held[m])

    return store


def _each_float(
    matrices: Sequence[tuple[Matrix | Floats, Sequence[Buffer]]],
    x: Buffer,
    begins: Buffer,
    members: Buffer,
    row_of: Callable[[Expr], Expr],
    write: Callable[[Expr, Expr, Sequence[Expr]], None],
) -> None:
    matrix, experts = matrices[0][0], members.shape[0]
    columns = int(matrix.columns)
    with blocks(matrix.rows, experts, threads=NARROW) as (row, expert, thread):
        which, begin = bind(members[expert]), bind(begins[expert])
        count = bind(tirx.Select(which >= 0, begins[expert + 1] - begin, 0))
        with T.serial(0, count) as index:
            place = bind(begin + index)
            token = bind(row_of(place))
            values = []
            for _, (held,) in matrices:

                def term(at: Expr, held: Buffer = held) -> Expr:
                    return x[token, at] * cast(held[which, row, at], "float32")

                values.append(float_product(term, columns, thread))
            with T.If(thread < 1), T.Then():
                write(place, row, values)
