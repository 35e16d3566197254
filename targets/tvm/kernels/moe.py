"""Sparse experts: products with the chosen ones only, each with its own width.

    gate_up    silu(w1 x) * (w3 x) of every place, experts' rows side by side
    down       w2 of every place

Places (token, slot) come sorted by expert, as `lfmc.targets.tvm.kernels.routing` leaves them. A
layer's experts of the same formats lie in one stack; both are called once for each such kind, and
pass over experts of others.
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
    bind,
    build,
    dimension,
    local,
    put,
    tokens_of,
    vector,
)
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.kernels.float_linear import row_product
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix, sized
from lfmc.targets.tvm.kernels.products import Rows, multiply
from lfmc.targets.tvm.kernels.swiglu import gated


@dataclass(frozen=True)
class Floats:
    """Matrices `[count, rows, columns]` that stay float."""

    rows: int
    columns: int
    dtype: str

    def parameters(self, name: str) -> list[Parameter]:
        return [(name, (dimension(f"{name}_count"), self.rows, self.columns), self.dtype)]


Stack = Format | Floats


def gate_up(
    one: Stack, three: Stack, cpu: Cpu, tokens: int | None, *, top_k: int, exact: bool
) -> PrimFunc:
    """For experts of one kind: activations of `T` tokens, `order`, `begins`, `members` int32 `[E]`
    (where an expert is in the stacks, -1 for one of another kind), the constants of w1 and of w3;
    in place float32 `[T k, I]`, a row a place, sorted by expert."""
    count = tokens_of(tokens)
    first = _matrices(one, exact)
    second = beside(first, three)
    given = _given(first, count, exact)
    ones, threes = first.parameters("w1"), second.parameters("w3")
    parameters = [
        *given,
        *places(count * top_k),
        *ones,
        *threes,
        ("y", (count * top_k, first.rows), "float32"),
    ]

    def body(*buffers: Buffer) -> None:
        x = Activations(buffers[: len(given)])
        order, begins, members, *constants, y = buffers[len(given) :]
        held = tuple(constants[: len(ones)]), tuple(constants[len(ones) :])

        def write(which: Expr, block: Expr, places: list[Expr]) -> None:
            rows = [bind(tirx.floordiv(order[place], top_k)) for place in places]
            gates = _products(first, held[0], which, block, x, rows, cpu, exact)
            ups = _products(second, held[1], which, block, x, rows, cpu, exact)
            for place, gate, up in zip(places, gates, ups, strict=True):
                put(y, gated(gate(), up()), place, block * ROWS)

        _each_block(begins, members, first.rows, cpu, tokens, exact, write)

    return build(parameters, body)


def down(two: Stack, cpu: Cpu, tokens: int | None, *, top_k: int, exact: bool) -> PrimFunc:
    """For experts of one kind: activations of every place, `order`, `begins`, `members`, the
    constants of w2; in place float32 `[T k, H]`, a row a place, in the order of tokens."""
    count = dimension("P") if tokens is None else tokens * top_k
    matrix = _matrices(two, exact)
    given = _given(matrix, count, exact)
    parameters = [
        *given,
        *places(count),
        *matrix.parameters("w2"),
        ("y", (count, matrix.rows), "float32"),
    ]

    def body(*buffers: Buffer) -> None:
        x = Activations(buffers[: len(given)])
        order, begins, members, *constants, y = buffers[len(given) :]

        def write(which: Expr, block: Expr, places: list[Expr]) -> None:
            results = _products(matrix, tuple(constants), which, block, x, places, cpu, exact)
            for place, result in zip(places, results, strict=True):
                put(y, result(), order[place], block * ROWS)

        _each_block(begins, members, matrix.rows, cpu, tokens, exact, write)

    return build(parameters, body)


def _matrices(stack: Stack, exact: bool) -> Matrix | Floats:
    if isinstance(stack, Floats):
        return stack
    return sized(stack, 0, exact=exact, count=dimension("M"))


def beside(matrix: Matrix | Floats, other: Stack) -> Matrix | Floats:
    """Matrices of the same sizes in another format; those of an expert are all n-bit, or none."""
    if isinstance(matrix, Matrix) and isinstance(other, Format):
        return replace(matrix, format=other)
    assert isinstance(other, Floats)
    return other


def _given(matrix: Matrix | Floats, count: Expr, exact: bool) -> list[Parameter]:
    """What the products multiply by."""
    if isinstance(matrix, Floats):
        return [("x", (count, matrix.columns), "float32")]
    return Activations.parameters(matrix, count, exact)


def places(count: Expr) -> list[Parameter]:
    experts = dimension("E")
    return [
        ("order", (count,), "int32"),
        ("begins", (experts + 1,), "int32"),
        ("members", (experts,), "int32"),
    ]


def _products(
    matrix: Matrix | Floats,
    constants: tuple[Buffer, ...],
    which: Expr,
    block: Expr,
    x: Activations,
    rows: list[Expr],
    cpu: Cpu,
    exact: bool,
) -> list[Callable[[], Expr]]:
    if isinstance(matrix, Matrix):
        return multiply(Rows(matrix, constants, block, which), x, rows, cpu, exact=exact)
    (weights,), columns = constants, matrix.columns
    found = [_float_rows(weights, which, block, x, row, columns) for row in rows]
    return [partial(_same, value) for value in found]


def _same(value: Expr) -> Expr:
    return value


def _float_rows(
    weights: Buffer, which: Expr, block: Expr, x: Activations, row: Expr, columns: int
) -> Expr:
    """Products of a block of float rows with a token: a vector of 16."""
    found = local(ROWS, "float32")
    with T.serial(0, ROWS) as lane:
        value = row_product(
            lambda at: vector(x.buffers[0], row, at),
            lambda at: vector(weights, which, block * ROWS + lane, at),
            columns,
        )
        put(found, value, lane)
    return bind(vector(found, 0))


def _each_block(
    begins: Buffer,
    members: Buffer,
    rows: Expr,
    cpu: Cpu,
    tokens: int | None,
    exact: bool,
    write: Callable[[Expr, Expr, list[Expr]], None],
) -> None:
    """Every block of rows of every expert that is a member and was chosen, with its places. Experts
    alternate, so that threads have work alike, whoever is chosen."""
    tile = 1 if tokens == 1 or exact else cpu.tile
    experts = members.shape[0]
    with T.parallel(0, tirx.floordiv(rows, ROWS) * experts) as task:
        block = bind(tirx.floordiv(task, experts))
        expert = bind(tirx.floormod(task, experts))
        which = bind(members[expert])
        with T.If(which >= 0), T.Then():
            begin, end = bind(begins[expert]), bind(begins[expert + 1])
            whole = bind(tirx.floordiv(end - begin, tile))
            with T.serial(0, whole) as index:
                write(which, block, [begin + index * tile + offset for offset in range(tile)])
            if tile > 1:
                with T.serial(0, end - begin - whole * tile) as rest:
                    write(which, block, [begin + whole * tile + rest])
