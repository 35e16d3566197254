"""Sparse experts for GPUs: see `lfmc.targets.tvm.kernels.moe` and `routing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.calib_free.grid.formats import Format
from lfmc.targets.shared.row_blocks import ROWS
from lfmc.targets.tvm.kernels import routing as cpu_routing
from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Expr,
    PrimFunc,
    alloc_local,
    bind,
    build,
    cast,
    dimension,
    store,
    token_count,
)
from lfmc.targets.tvm.kernels.gpu.grid import thread_blocks
from lfmc.targets.tvm.kernels.gpu.linear import (
    NARROW_THREADS,
    TILE,
    add_products,
    alloc_zeros,
    float_product,
    reduce_and_write,
)
from lfmc.targets.tvm.kernels.matrix import Matrix, dynamic_matrix
from lfmc.targets.tvm.kernels.moe import FloatStack, Stack, route_parameters, same_sizes
from lfmc.targets.tvm.kernels.row import Row
from lfmc.targets.tvm.kernels.swiglu import gated


def route(experts: int, top_k: int, normalize: bool, scale: float, tokens: int | None) -> PrimFunc:
    """Select experts with one thread: the work is small."""
    single_thread = lambda: thread_blocks(1, threads=1)  # noqa: E731
    return cpu_routing.route(experts, top_k, normalize, scale, tokens, scope=single_thread)


def group(experts: int, top_k: int, tokens: int | None) -> PrimFunc:
    """Sort places by expert with one thread."""
    return cpu_routing.group(experts, top_k, tokens, scope=lambda: thread_blocks(1, threads=1))


def gate_up(
    w1: Stack, w3: Stack, device: object, tokens: int | None, *, top_k: int, exact: bool
) -> PrimFunc:
    """Apply w1 and w3 of the experts of one stack."""
    count = token_count(tokens)
    first = _kernel_matrix(w1)
    second = same_sizes(first, w3)
    w1_parameters, w3_parameters = first.parameters("w1"), second.parameters("w3")
    parameters = [
        ("x", (count, first.columns), "float32"),
        *route_parameters(count * top_k),
        *w1_parameters,
        *w3_parameters,
        ("y", (count * top_k, first.rows), "float32"),
    ]

    def body(x: Buffer, order: Buffer, begins: Buffer, members: Buffer, *rest: Buffer) -> None:
        *constants, y = rest
        stacks = constants[: len(w1_parameters)], constants[len(w1_parameters) :]

        def row_of(place: Expr) -> Expr:
            return tirx.floordiv(order[place], top_k)

        def write(place: Expr, row: Expr, values: Sequence[Expr]) -> None:
            store(y, gated(*values), place, row)

        _for_each_expert(
            [(first, stacks[0]), (second, stacks[1])], x, begins, members, tokens, row_of, write
        )

    return build(parameters, body)


def down(w2: Stack, device: object, tokens: int | None, *, top_k: int, exact: bool) -> PrimFunc:
    """Apply w2 of the experts of one stack."""
    count = dimension("P") if tokens is None else tokens * top_k
    matrix = _kernel_matrix(w2)
    parameters = [
        ("x", (count, matrix.columns), "float32"),
        *route_parameters(count),
        *matrix.parameters("w2"),
        ("y", (count, matrix.rows), "float32"),
    ]

    def body(x: Buffer, order: Buffer, begins: Buffer, members: Buffer, *rest: Buffer) -> None:
        *constants, y = rest

        def write(place: Expr, row: Expr, values: Sequence[Expr]) -> None:
            store(y, values[0], order[place], row)

        _for_each_expert(
            [(matrix, constants)], x, begins, members, tokens, lambda place: place, write
        )

    return build(parameters, body)


def _kernel_matrix(stack: Stack) -> Matrix | FloatStack:
    if isinstance(stack, Format):
        return dynamic_matrix(stack, 0, exact=True, count=dimension("M"))
    return stack


def _for_each_expert(
    matrices: Sequence[tuple[Matrix | FloatStack, Sequence[Buffer]]],
    x: Buffer,
    begins: Buffer,
    members: Buffer,
    tokens: int | None,
    row_of: Callable[[Expr], Expr],
    write: Callable[[Expr, Expr, Sequence[Expr]], None],
) -> None:
    """Emit the rows of every selected expert of the stack, with the places of the expert."""
    matrix, experts = matrices[0][0], members.shape[0]
    if isinstance(matrix, FloatStack):
        _for_each_float_expert(matrices, x, begins, members, row_of, write)
        return
    tile = 1 if tokens == 1 else TILE
    with thread_blocks(matrix.blocks, experts) as (block, expert, thread):
        lane = bind(tirx.floormod(thread, ROWS))
        member, begin = bind(members[expert]), bind(begins[expert])
        count = bind(begins[expert + 1] - begin)
        turns = tirx.Select(member >= 0, tirx.floordiv(count + (tile - 1), tile), 0)
        with T.serial(0, bind(turns)) as turn:
            places = [
                bind(tirx.min(turn * tile + index, count - 1) + begin) for index in range(tile)
            ]
            rows = [bind(row_of(place)) for place in places]
            results: list[list[Expr]] = [[] for _ in range(tile)]
            for index, (stack, constants) in enumerate(matrices):
                assert isinstance(stack, Matrix)
                sums = alloc_zeros(tile)
                add_products(Row(stack, constants, block, lane, member), x, rows, thread, sums)

                def collect(
                    index: int, value: Expr, is_last: bool = index == len(matrices) - 1
                ) -> None:
                    results[index].append(value)
                    if is_last:
                        with T.If(turn * tile + index < count), T.Then():
                            write(places[index], block * ROWS + lane, results[index])

                # The results of the first matrix stay in registers of the same thread.
                reduce_and_write(
                    sums,
                    tile,
                    lane,
                    thread,
                    thread < ROWS,
                    _store_and_collect(collect, tile),
                )


def _store_and_collect(
    collect: Callable[[int, Expr], None], tile: int
) -> Callable[[int, Expr], None]:
    """Return a writer that stores each result in a register of the thread, and passes it to
    `collect`."""
    registers = alloc_local(tile)

    def store_result(index: int, value: Expr) -> None:
        store(registers, value, index)
        collect(index, registers[index])

    return store_result


def _for_each_float_expert(
    matrices: Sequence[tuple[Matrix | FloatStack, Sequence[Buffer]]],
    x: Buffer,
    begins: Buffer,
    members: Buffer,
    row_of: Callable[[Expr], Expr],
    write: Callable[[Expr, Expr, Sequence[Expr]], None],
) -> None:
    """Emit the rows of every selected float expert of the stack, a block for each row."""
    matrix, experts = matrices[0][0], members.shape[0]
    columns = int(matrix.columns)
    with thread_blocks(matrix.rows, experts, threads=NARROW_THREADS) as (row, expert, thread):
        member, begin = bind(members[expert]), bind(begins[expert])
        count = bind(tirx.Select(member >= 0, begins[expert + 1] - begin, 0))
        with T.serial(0, count) as index:
            place = bind(begin + index)
            token = bind(row_of(place))
            values = []
            for _, (weights,) in matrices:

                def term(column: Expr, weights: Buffer = weights) -> Expr:
                    return x[token, column] * cast(weights[member, row, column], "float32")

                values.append(float_product(term, columns, thread))
            with T.If(thread < 1), T.Then():
                write(place, row, values)
