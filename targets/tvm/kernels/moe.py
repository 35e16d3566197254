"""Sparse experts: who is chosen, and products with the chosen ones only, each with its own width.

    route      scores -> experts of each token, and what they count for
    group      the same places (token, slot), sorted by expert
    gate_up    silu(w1 x) * (w3 x) of every place, experts' rows side by side
    down       w2 of every place
    combine    the sum over a token's slots

A layer's experts of one format lie in one constant, one behind the other; `Experts` says where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.cpus import Cpu
from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    Parameter,
    PrimFunc,
    bind,
    build,
    dimension,
    over_tokens,
    put,
    tokens_of,
    vector,
    wide,
)
from lfmc.targets.tvm.kernels.float_linear import row_product
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix, Rows, multiply
from lfmc.targets.tvm.kernels.swiglu import gated
from lfmc.targets.tvm.layout import ROWS


@dataclass(frozen=True)
class Floats:
    """Matrices `[count, rows, columns]` that stay float."""

    rows: int
    columns: int
    dtype: str
    count: int

    def parameters(self, name: str) -> list[Parameter]:
        return [(name, (self.count, self.rows, self.columns), self.dtype)]


@dataclass(frozen=True)
class Experts:
    """One matrix of every expert of a layer: a stack for each format, and for each expert which
    stack, and where in it."""

    stacks: tuple[Matrix | Floats, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return self.stacks[0].rows

    @property
    def columns(self) -> int:
        return self.stacks[0].columns

    @property
    def floats(self) -> bool:
        return isinstance(self.stacks[0], Floats)

    def parameters(self, name: str) -> list[list[Parameter]]:
        return [stack.parameters(f"{name}_{i}") for i, stack in enumerate(self.stacks)]

    def given(self, tokens: Expr, exact: bool) -> list[Parameter]:
        """What the products multiply by."""
        first = self.stacks[0]
        if isinstance(first, Floats):
            return Activations.parameters(first.columns, 1, tokens, True)
        return Activations.parameters(first.columns, first.groups, tokens, exact)


def route(
    experts: int, top_k: int, normalize: bool, scale: float, tokens: int | None
) -> PrimFunc:
    """Scores and choice float32 `[T, E]`; results experts int32 and shares float32 `[T, k]`."""
    count = tokens_of(tokens)
    parameters = [
        ("scores", (count, experts), "float32"),
        ("choice", (count, experts), "float32"),
        ("chosen", (count, top_k), "int32"),
        ("shares", (count, top_k), "float32"),
    ]

    def body(scores: Buffer, choice: Buffer, chosen: Buffer, shares: Buffer) -> None:
        with T.serial(0, count) as token:
            taken = T.alloc_buffer((experts,), "int32")
            with T.serial(0, experts) as expert:
                put(taken, tirx.const(0, "int32"), expert)
            whole = T.alloc_buffer((1,), "float32")
            put(whole, tirx.const(0.0, "float32"), 0)
            for slot in range(top_k):
                best = T.alloc_buffer((1,), "int32")
                put(best, tirx.const(-1, "int32"), 0)
                with T.serial(0, experts) as expert:
                    rival = choice[token, tirx.max(best[0], 0)]
                    better = tirx.Or(best[0] < 0, choice[token, expert] > rival)
                    with T.If(tirx.And(taken[expert] == 0, better)), T.Then():
                        put(best, expert, 0)
                put(taken, tirx.const(1, "int32"), best[0])
                put(chosen, best[0], token, slot)
                put(whole, whole[0] + scores[token, best[0]], 0)
            for slot in range(top_k):
                share = scores[token, chosen[token, slot]]
                if normalize:
                    share = share / (whole[0] + tirx.const(1e-6, "float32"))
                put(shares, share * tirx.const(scale, "float32"), token, slot)

    return build(parameters, body)


def group(experts: int, top_k: int, tokens: int | None) -> PrimFunc:
    """Places `token * k + slot` sorted by expert, int32 `[T k]`, and where each expert's begin,
    int32 `[E + 1]`, of `chosen` int32 `[T, k]`."""
    count = tokens_of(tokens)
    parameters = [
        ("chosen", (count, top_k), "int32"),
        ("order", (count * top_k,), "int32"),
        ("begins", (experts + 1,), "int32"),
    ]

    def body(chosen: Buffer, order: Buffer, begins: Buffer) -> None:
        zero, one = tirx.const(0, "int32"), tirx.const(1, "int32")
        free = T.alloc_buffer((experts,), "int32")
        with T.serial(0, experts + 1) as expert:
            put(begins, zero, expert)
        with T.serial(0, count) as token, T.serial(0, top_k) as slot:
            behind = chosen[token, slot] + 1
            put(begins, begins[behind] + one, behind)
        with T.serial(0, experts) as expert:
            put(begins, begins[expert + 1] + begins[expert], expert + 1)
            put(free, begins[expert], expert)
        with T.serial(0, count) as token, T.serial(0, top_k) as slot:
            own = bind(chosen[token, slot])
            put(order, token * top_k + slot, free[own])
            put(free, free[own] + one, own)

    return build(parameters, body)


def gate_up(
    w1: Experts, w3: Experts, top_k: int, cpu: Cpu, tokens: int | None, *, exact: bool
) -> PrimFunc:
    """Activations of `T` tokens, `order`, `begins`, the constants of w1 and of w3; result float32
    `[T k, I]`, a row a place, sorted by expert."""
    count = tokens_of(tokens)
    given = w1.given(count, exact)
    ones, threes = w1.parameters("w1"), w3.parameters("w3")
    parameters = [
        *given,
        ("order", (count * top_k,), "int32"),
        ("begins", (len(w1.places) + 1,), "int32"),
        *(p for stack in (*ones, *threes) for p in stack),
        ("y", (count * top_k, w1.rows), "float32"),
    ]

    def body(*buffers: Buffer) -> None:
        x, order, begins, rest = _take(buffers, len(given), len(parameters))
        held = _stacks(rest, [*ones, *threes])
        first, second = held[: len(ones)], held[len(ones) :]
        y = buffers[-1]

        def write(expert: Expr, block: Expr, places: list[Expr]) -> None:
            rows = [bind(tirx.floordiv(order[place], top_k)) for place in places]
            for one, three in _pairs(w1, w3):
                with T.If(_is_one_of(expert, one, three, w1, w3)), T.Then():
                    gates = _products(w1, one, first, expert, block, x, rows, cpu, exact)
                    ups = _products(w3, three, second, expert, block, x, rows, cpu, exact)
                    for place, gate, up in zip(places, gates, ups, strict=True):
                        put(y, gated(gate(), up()), place, block * ROWS)

        _each_block(len(w1.places), w1.rows, begins, cpu, tokens, exact, write)

    return build(parameters, body)


def down(w2: Experts, cpu: Cpu, tokens: int | None, *, exact: bool, top_k: int) -> PrimFunc:
    """Activations of every place (sorted by expert), `order`, `begins`, the constants of w2; result
    float32 `[T k, H]`, a row a place, in the order of tokens."""
    count = dimension("P") if tokens is None else tokens * top_k
    given, twos = w2.given(count, exact), w2.parameters("w2")
    parameters = [
        *given,
        ("order", (count,), "int32"),
        ("begins", (len(w2.places) + 1,), "int32"),
        *(p for stack in twos for p in stack),
        ("y", (count, w2.rows), "float32"),
    ]

    def body(*buffers: Buffer) -> None:
        x, order, begins, rest = _take(buffers, len(given), len(parameters))
        held, y = _stacks(rest, twos), buffers[-1]

        def write(expert: Expr, block: Expr, places: list[Expr]) -> None:
            for two in range(len(w2.stacks)):
                with T.If(_is_one_of(expert, two, None, w2, None)), T.Then():
                    results = _products(w2, two, held, expert, block, x, places, cpu, exact)
                    for place, result in zip(places, results, strict=True):
                        put(y, result(), order[place], block * ROWS)

        _each_block(len(w2.places), w2.rows, begins, cpu, tokens, exact, write)

    return build(parameters, body)


def combine(size: int, top_k: int, tokens: int | None) -> PrimFunc:
    """Shares `[T, k]` and results of places `[T k, H]`; result `[T, H]`."""
    count = tokens_of(tokens)
    parameters = [
        ("shares", (count, top_k), "float32"),
        ("x", (count * top_k, size), "float32"),
        ("y", (count, size), "float32"),
    ]

    def body(shares: Buffer, x: Buffer, y: Buffer) -> None:
        with over_tokens(count, tokens) as token, T.serial(0, size // LANES) as block:
            at, whole = block * LANES, None
            for slot in range(top_k):
                part = vector(x, token * top_k + slot, at) * wide(shares[token, slot])
                whole = part if whole is None else whole + part
            put(y, whole, token, at)

    return build(parameters, body)


def _take(
    buffers: Sequence[Buffer], given: int, count: int
) -> tuple[Activations, Buffer, Buffer, Sequence[Buffer]]:
    x = Activations(tuple(buffers[:given]))
    return x, buffers[given], buffers[given + 1], buffers[given + 2 : count - 1]


def _stacks(
    buffers: Sequence[Buffer], parameters: Sequence[Sequence[Parameter]]
) -> list[tuple[Buffer, ...]]:
    found, at = [], 0
    for own in parameters:
        found.append(tuple(buffers[at : at + len(own)]))
        at += len(own)
    return found


def _pairs(w1: Experts, w3: Experts) -> list[tuple[int, int]]:
    """Stacks that experts have of both."""
    pairs = zip(w1.places, w3.places, strict=True)
    return sorted({(one[0], three[0]) for one, three in pairs})


def _is_one_of(
    expert: Expr, stack: int, other: int | None, experts: Experts, others: Experts | None
) -> Expr:
    """Whether an expert's matrix is in a stack (and its other matrix in another)."""
    members = [
        index
        for index, place in enumerate(experts.places)
        if place[0] == stack and (others is None or others.places[index][0] == other)
    ]
    condition = None
    for begin, end in _ranges(members):
        own = tirx.And(expert >= begin, expert < end)
        condition = own if condition is None else tirx.Or(condition, own)
    return condition


def _ranges(members: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours as spans."""
    spans: list[tuple[int, int]] = []
    for index in members:
        if spans and spans[-1][1] == index:
            spans[-1] = (spans[-1][0], index + 1)
        else:
            spans.append((index, index + 1))
    return spans


def _place(experts: Experts, stack: int, expert: Expr) -> Expr:
    """Where in its stack an expert is: how many of the stack are before it."""
    place = tirx.const(0, "int32")
    for index, (own, _) in enumerate(experts.places):
        if own == stack:
            place = place + tirx.Cast("int32", expert > index)
    return bind(place)


def _products(
    experts: Experts,
    stack: int,
    held: Sequence[tuple[Buffer, ...]],
    expert: Expr,
    block: Expr,
    x: Activations,
    rows: list[Expr],
    cpu: Cpu,
    exact: bool,
) -> list[Callable[[], Expr]]:
    matrix, which = experts.stacks[stack], _place(experts, stack, expert)
    if isinstance(matrix, Floats):
        return [
            lambda row=row: _float_rows(held[stack][0], which, block, x, row, matrix.columns)
            for row in rows
        ]
    return multiply(Rows(matrix, held[stack], block, which), x, rows, cpu, exact=exact)


def _float_rows(
    weights: Buffer, which: Expr, block: Expr, x: Activations, row: Expr, columns: int
) -> Expr:
    """Products of a block of float rows with a token: a vector of 16."""
    found = T.alloc_buffer((ROWS,), "float32")
    with T.serial(0, ROWS) as lane:
        value = row_product(
            lambda at: vector(x.buffers[0], row, at),
            lambda at: vector(weights, which, block * ROWS + lane, at),
            columns,
        )
        put(found, value, lane)
    return bind(vector(found, 0))


def _each_block(
    experts: int,
    rows: int,
    begins: Buffer,
    cpu: Cpu,
    tokens: int | None,
    exact: bool,
    write: Callable[[Expr, Expr, list[Expr]], None],
) -> None:
    """Every block of rows of every expert that was chosen, with its places. Experts alternate, so
    that threads have work alike, whoever is chosen."""
    tile = 1 if tokens == 1 else 4 if exact else cpu.tile
    with T.parallel(0, rows // ROWS * experts) as task:
        block = bind(tirx.floordiv(task, experts))
        expert = bind(tirx.floormod(task, experts))
        begin, end = bind(begins[expert]), bind(begins[expert + 1])
        whole = bind(tirx.floordiv(end - begin, tile))
        with T.serial(0, whole) as index:
            write(expert, block, [begin + index * tile + offset for offset in range(tile)])
        if tile > 1:
            with T.serial(0, end - begin - whole * tile) as rest:
                write(expert, block, [begin + whole * tile + rest])
