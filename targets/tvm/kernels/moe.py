"""Sparse experts: products with the selected experts only, each with its own width.

    gate_up    silu(w1 x) * (w3 x) of every place, the places of an expert next to each other
    down       w2 of every place

A place is a pair (token, slot). The places are sorted by expert
(`lfmc.targets.tvm.kernels.routing`). The experts of a layer that share formats form one stack. The
library calls the two kernels once for each stack; a call skips the experts of other stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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
    dimension,
    store,
    token_count,
    vector,
)
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.kernels.float_linear import row_product
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix, dynamic_matrix
from lfmc.targets.tvm.kernels.products import RowBlock, multiply
from lfmc.targets.tvm.kernels.swiglu import gated


@dataclass(frozen=True)
class FloatStack:
    """Float matrices `[count, rows, columns]`."""

    rows: int
    columns: int
    dtype: str

    def parameters(self, name: str) -> list[Parameter]:
        return [(name, (dimension(f"{name}_count"), self.rows, self.columns), self.dtype)]


Stack = Format | FloatStack


def gate_up(
    w1: Stack, w3: Stack, cpu: Cpu, tokens: int | None, *, top_k: int, exact: bool
) -> PrimFunc:
    """Apply w1 and w3 of the experts of one stack. Inputs: activations of `T` tokens, `order`,
    `begins`, `members` int32 `[E]` (the index of an expert in the stack, or -1 for an expert of
    another stack), and the constants of w1 and of w3. Written in place: float32 `[T k, I]`, a row
    for each place, sorted by expert."""
    count = token_count(tokens)
    first = _kernel_matrix(w1, exact)
    second = same_sizes(first, w3)
    activation_parameters = _activation_parameters(first, count, exact)
    w1_parameters, w3_parameters = first.parameters("w1"), second.parameters("w3")
    parameters = [
        *activation_parameters,
        *route_parameters(count * top_k),
        *w1_parameters,
        *w3_parameters,
        ("y", (count * top_k, first.rows), "float32"),
    ]

    def body(*buffers: Buffer) -> None:
        x = Activations(buffers[: len(activation_parameters)])
        order, begins, members, *constants, y = buffers[len(activation_parameters) :]
        stacks = tuple(constants[: len(w1_parameters)]), tuple(constants[len(w1_parameters) :])

        def write(member: Expr, block: Expr, places: list[Expr]) -> None:
            rows = [bind(tirx.floordiv(order[place], top_k)) for place in places]
            gates = _multiply_block(first, stacks[0], member, block, x, rows, cpu, exact)
            ups = _multiply_block(second, stacks[1], member, block, x, rows, cpu, exact)
            for place, gate, up in zip(places, gates, ups, strict=True):
                store(y, gated(gate(), up()), place, block * ROWS)

        _for_each_block(begins, members, first.rows, cpu, tokens, exact, write)

    return build(parameters, body)


def down(w2: Stack, cpu: Cpu, tokens: int | None, *, top_k: int, exact: bool) -> PrimFunc:
    """Apply w2 of the experts of one stack. Inputs: activations of every place, `order`, `begins`,
    `members`, and the constants of w2. Written in place: float32 `[T k, H]`, a row for each place,
    in the order of tokens."""
    count = dimension("P") if tokens is None else tokens * top_k
    matrix = _kernel_matrix(w2, exact)
    activation_parameters = _activation_parameters(matrix, count, exact)
    parameters = [
        *activation_parameters,
        *route_parameters(count),
        *matrix.parameters("w2"),
        ("y", (count, matrix.rows), "float32"),
    ]

    def body(*buffers: Buffer) -> None:
        x = Activations(buffers[: len(activation_parameters)])
        order, begins, members, *constants, y = buffers[len(activation_parameters) :]

        def write(member: Expr, block: Expr, places: list[Expr]) -> None:
            readers = _multiply_block(
                matrix, tuple(constants), member, block, x, places, cpu, exact
            )
            for place, read_result in zip(places, readers, strict=True):
                store(y, read_result(), order[place], block * ROWS)

        _for_each_block(begins, members, matrix.rows, cpu, tokens, exact, write)

    return build(parameters, body)


def _kernel_matrix(stack: Stack, exact: bool) -> Matrix | FloatStack:
    if isinstance(stack, FloatStack):
        return stack
    return dynamic_matrix(stack, 0, exact=exact, count=dimension("M"))


def same_sizes(matrix: Matrix | FloatStack, stack: Stack) -> Matrix | FloatStack:
    """Return matrices of the same sizes in another format; the matrices of an expert are all n-bit,
    or all float."""
    if isinstance(matrix, Matrix) and isinstance(stack, Format):
        return replace(matrix, format=stack)
    assert isinstance(stack, FloatStack)
    return stack


def _activation_parameters(
    matrix: Matrix | FloatStack, count: Expr, exact: bool
) -> list[Parameter]:
    """Return the parameters of the activations of a product."""
    if isinstance(matrix, FloatStack):
        return [("x", (count, matrix.columns), "float32")]
    return Activations.parameters(matrix, count, exact)


def route_parameters(count: Expr) -> list[Parameter]:
    """Return the parameters that map places to experts."""
    expert_count = dimension("E")
    return [
        ("order", (count,), "int32"),
        ("begins", (expert_count + 1,), "int32"),
        ("members", (expert_count,), "int32"),
    ]


def _multiply_block(
    matrix: Matrix | FloatStack,
    constants: tuple[Buffer, ...],
    member: Expr,
    block: Expr,
    x: Activations,
    rows: list[Expr],
    cpu: Cpu,
    exact: bool,
) -> list[Callable[[], Expr]]:
    if isinstance(matrix, Matrix):
        return multiply(RowBlock(matrix, constants, block, member), x, rows, cpu, exact=exact)
    (weights,), columns = constants, matrix.columns
    vectors = [_float_rows(weights, member, block, x, row, columns) for row in rows]
    return [partial(_identity, value) for value in vectors]


def _identity(value: Expr) -> Expr:
    return value


def _float_rows(
    weights: Buffer, member: Expr, block: Expr, x: Activations, row: Expr, columns: int
) -> Expr:
    """Multiply a block of float rows with a token: a vector of 16."""
    products = alloc_local(ROWS, "float32")
    with T.serial(0, ROWS) as lane:
        value = row_product(
            lambda column: vector(x.buffers[0], row, column),
            lambda column: vector(weights, member, block * ROWS + lane, column),
            columns,
        )
        store(products, value, lane)
    return bind(vector(products, 0))


def _for_each_block(
    begins: Buffer,
    members: Buffer,
    rows: Expr,
    cpu: Cpu,
    tokens: int | None,
    exact: bool,
    write: Callable[[Expr, Expr, list[Expr]], None],
) -> None:
    """Emit every block of rows of every selected expert of the stack, with the places of the
    expert. Consecutive tasks belong to different experts, so that threads have equal work,
    whichever experts are selected."""
    tile = 1 if tokens == 1 or exact else cpu.tile
    expert_count = members.shape[0]
    with T.parallel(0, tirx.floordiv(rows, ROWS) * expert_count) as task:
        block = bind(tirx.floordiv(task, expert_count))
        expert = bind(tirx.floormod(task, expert_count))
        member = bind(members[expert])
        with T.If(member >= 0), T.Then():
            begin, end = bind(begins[expert]), bind(begins[expert + 1])
            whole_tiles = bind(tirx.floordiv(end - begin, tile))
            with T.serial(0, whole_tiles) as index:
                write(member, block, [begin + index * tile + offset for offset in range(tile)])
            if tile > 1:
                with T.serial(0, end - begin - whole_tiles * tile) as place:
                    write(member, block, [begin + whole_tiles * tile + place])
