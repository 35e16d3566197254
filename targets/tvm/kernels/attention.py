"""Grouped-query attention over a KV cache: rotary angles, cache writes, and attention.

Keys are `[K, C / 16, D, 16]`, so that the scores of 16 positions are one vector and need no sum
across lanes. Values are `[K, C, D]`. The kernels read and write the keys and the values in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Columns,
    Expr,
    Parameter,
    PrimFunc,
    alloc_local,
    bind,
    broadcast,
    build,
    cast,
    exp,
    max_lanes,
    maybe_parallel,
    store,
    sum_lanes,
    token_count,
    vector,
)
from lfmc.targets.tvm.kernels.rms_norm import normalize

SLOTS = 16  # positions in a block of keys
MASKED = -1e30
TOKEN_TILE = 4  # tokens that read keys and values together
VALUE_COLUMNS = 32  # columns of values at once: more sums would not fit in the registers


@dataclass(frozen=True)
class Heads:
    """The number of query heads and of key heads, the head dim, and the slots of the cache (a
    multiple of 16)."""

    queries: int
    keys: int
    dim: int
    slots: int

    @property
    def queries_per_key(self) -> int:
        """The number of query heads that share a key head."""
        return self.queries // self.keys

    @property
    def keys_shape(self) -> tuple[int, ...]:
        return (self.keys, self.slots // SLOTS, self.dim, SLOTS)

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.keys, self.slots, self.dim)


def angles(dim: int, tokens: int | None) -> PrimFunc:
    """Compute cosines and sines `[T, D]` of the rotary angles of the tokens; the two halves of a
    row are equal. Inputs: the position of the first token int32 `[1]`, and steps float32 `[D / 2]`.
    """
    count = token_count(tokens)
    parameters = [
        ("start", (1,), "int32"),
        ("steps", (dim // 2,), "float32"),
        ("cos", (count, dim), "float32"),
        ("sin", (count, dim), "float32"),
    ]

    def body(start: Buffer, steps: Buffer, cos: Buffer, sin: Buffer) -> None:
        with maybe_parallel(count, tokens) as token, T.serial(0, dim // 2) as column:
            angle = bind(cast(start[0] + token, "float32") * steps[column])
            for table, value in ((cos, bind(tirx.cos(angle))), (sin, bind(tirx.sin(angle)))):
                store(table, value, token, column)
                store(table, value, token, column + dim // 2)

    return build(parameters, body)


def write_heads_parameters(
    heads: Heads, parts: tuple[Columns, Columns, Columns], dtypes: tuple[str, str], count: Expr
) -> list[Parameter]:
    """Return the parameters of `write_heads`, which are the same on every device."""
    dim = heads.dim
    return [
        *((name, (count, p.width), "float32") for name, p in zip("qkv", parts, strict=True)),
        ("start", (1,), "int32"),
        ("q_norm", (dim,), dtypes[0]),
        ("k_norm", (dim,), dtypes[1]),
        ("cos", (count, dim), "float32"),
        ("sin", (count, dim), "float32"),
        ("keys", heads.keys_shape, "float32"),
        ("values", heads.values_shape, "float32"),
        ("y", (count, heads.queries * dim), "float32"),
    ]


def write_heads(
    heads: Heads,
    parts: tuple[Columns, Columns, Columns],
    dtypes: tuple[str, str],
    eps: float,
    tokens: int | None,
) -> PrimFunc:
    """Normalize and rotate queries and keys, and write keys and values to the cache.

    Inputs: tensors whose columns include the queries, keys and values, `start`, norms `[D]` of
    `dtypes`, and the angles. The caches are written in place. Result: the queries `[T, Q D]`.
    """
    count = token_count(tokens)
    query_heads, key_heads, dim = heads.queries, heads.keys, heads.dim
    parameters = write_heads_parameters(heads, parts, dtypes, count)
    starts = [part.start for part in parts]

    def body(
        q: Buffer,
        k: Buffer,
        v: Buffer,
        start: Buffer,
        q_norm: Buffer,
        k_norm: Buffer,
        cos: Buffer,
        sin: Buffer,
        keys: Buffer,
        values: Buffer,
        y: Buffer,
    ) -> None:
        with maybe_parallel(count, tokens) as token:
            position = bind(start[0] + token)
            with T.serial(0, query_heads) as head:
                rotated = _normalize_and_rotate(
                    q, token, starts[0] + head * dim, q_norm, cos, sin, dim, eps
                )
                with T.serial(0, dim) as column:
                    store(y, rotated(column), token, head * dim + column)
            with T.serial(0, key_heads) as head:
                rotated = _normalize_and_rotate(
                    k, token, starts[1] + head * dim, k_norm, cos, sin, dim, eps
                )
                block, slot = tirx.floordiv(position, SLOTS), tirx.floormod(position, SLOTS)
                with T.serial(0, dim) as column:
                    store(keys, rotated(column), head, block, column, slot)
                with T.serial(0, dim) as column:
                    store(values, v[token, starts[2] + head * dim + column], head, position, column)

    return build(parameters, body)


def _normalize_and_rotate(
    x: Buffer,
    token: Expr,
    start: Expr,
    norm: Buffer,
    cos: Buffer,
    sin: Buffer,
    dim: int,
    eps: float,
) -> Callable[[Expr], Expr]:
    """Normalize a head, and return a function that reads an element of the rotated head."""
    normalized = T.alloc_buffer((1, dim), "float32")
    normalize(x, token, start, norm, dim, eps, normalized, 0, 0)
    half = dim // 2

    def read(column: Expr) -> Expr:
        paired = normalized[0, tirx.floormod(column + half, dim)]
        paired = tirx.Select(column < half, tirx.const(0.0, "float32") - paired, paired)
        return normalized[0, column] * cos[token, column] + paired * sin[token, column]

    return read


def attend_parameters(heads: Heads, count: Expr) -> list[Parameter]:
    """Return the parameters of `attend`, which are the same on every device."""
    shape = (count, heads.queries * heads.dim)
    return [
        ("q", shape, "float32"),
        ("start", (1,), "int32"),
        ("keys", heads.keys_shape, "float32"),
        ("values", heads.values_shape, "float32"),
        ("y", shape, "float32"),
    ]


def attend(heads: Heads, window: int, tokens: int | None) -> PrimFunc:
    """Attend to the cache. Inputs: queries `[T, Q D]`, `start`, and the caches. Result: `[T, Q D]`.
    `window` is the number of positions that a token attends to; 0 stands for all."""
    count = token_count(tokens)
    parameters = attend_parameters(heads, count)
    tile = 1 if tokens == 1 else TOKEN_TILE

    def body(q: Buffer, start: Buffer, keys: Buffer, values: Buffer, y: Buffer) -> None:
        tiles = tirx.floordiv(count + (tile - 1), tile)
        with T.parallel(0, tiles * heads.keys) as task:
            # Late tokens attend to the most positions, so each thread gets early and late tokens.
            head, first = tirx.floordiv(task, tiles), tirx.floormod(task, tiles) * tile
            head, first = bind(head), bind(first)
            rows = [
                (bind(tirx.min(first + index, count - 1)), head * heads.queries_per_key + offset)
                for index in range(tile)
                for offset in range(heads.queries_per_key)
            ]
            _attend_rows(heads, window, rows, head, q, start, keys, values, y)

    return build(parameters, body)


def _attend_rows(
    heads: Heads,
    window: int,
    rows: list[tuple[Expr, Expr]],
    head: Expr,
    q: Buffer,
    start: Buffer,
    keys: Buffer,
    values: Buffer,
    y: Buffer,
) -> None:
    """Attend for some pairs of token and query head that share a key head."""
    dim, slots = heads.dim, heads.slots
    scores = T.alloc_buffer((len(rows), slots), "float32")
    positions = [bind(start[0] + token) for token, _ in rows]
    first_positions = [
        tirx.max(position - (window - 1), 0) if window else tirx.const(0, "int32")
        for position in positions
    ]
    first = bind(first_positions[0])
    first_block = bind(tirx.floordiv(first, SLOTS))
    end_block = bind(tirx.floordiv(positions[-1], SLOTS) + 1)
    maxima = alloc_local(len(rows) * LANES)
    for index in range(len(rows)):
        store(maxima, broadcast(MASKED), index * LANES)
    with T.serial(0, end_block - first_block) as step:
        block = bind(first_block + step)
        sums = alloc_local(len(rows) * LANES)
        for index in range(len(rows)):
            store(sums, broadcast(0.0), index * LANES)
        with T.serial(0, dim) as column:
            key = bind(vector(keys, head, block, column, 0))
            for index, (token, query_head) in enumerate(rows):
                part = key * broadcast(q[token, query_head * dim + column])
                store(sums, vector(sums, index * LANES) + part, index * LANES)
        slot = bind(broadcast(block * SLOTS) + tirx.Ramp(tirx.const(0, "int32"), 1, LANES))
        for index, position in enumerate(positions):
            visible = slot <= broadcast(position)
            if window:
                visible = tirx.And(visible, slot >= broadcast(first_positions[index]))
            scaled = vector(sums, index * LANES) * broadcast(dim**-0.5)
            score = bind(tirx.Select(visible, scaled, broadcast(MASKED)))
            store(scores, score, index, block * SLOTS)
            store(maxima, tirx.max(vector(maxima, index * LANES), score), index * LANES)
    inverse_sums = []
    for index in range(len(rows)):
        maximum = bind(broadcast(max_lanes(maxima, index * LANES)))
        sums = alloc_local(LANES)
        store(sums, broadcast(0.0), 0)
        with T.serial(0, end_block - first_block) as step:
            position = (first_block + step) * SLOTS
            value = bind(exp(vector(scores, index, position) - maximum))
            # e^-87 is not 0, so masked positions are set to 0 explicitly.
            value = bind(
                tirx.Select(
                    vector(scores, index, position) > broadcast(MASKED / 2), value, broadcast(0.0)
                )
            )
            store(scores, value, index, position)
            store(sums, vector(sums, 0) + value, 0)
        inverse_sums.append(bind(tirx.const(1.0, "float32") / sum_lanes(sums)))
    end = bind(positions[-1] + 1)
    for first_column in range(0, dim, VALUE_COLUMNS):
        width = min(VALUE_COLUMNS, dim - first_column)
        weighted = alloc_local(len(rows) * width)
        for index in range(len(rows)):
            for column in range(0, width, LANES):
                store(weighted, broadcast(0.0), index * width + column)
        with T.serial(0, end - first) as step:
            position = bind(first + step)
            for column in range(0, width, LANES):
                value = bind(vector(values, head, position, first_column + column))
                for index in range(len(rows)):
                    place = index * width + column
                    part = value * broadcast(scores[index, position])
                    store(weighted, vector(weighted, place) + part, place)
        for index, (token, query_head) in enumerate(rows):
            for column in range(0, width, LANES):
                value = vector(weighted, index * width + column) * broadcast(inverse_sums[index])
                store(y, value, token, query_head * dim + first_column + column)
