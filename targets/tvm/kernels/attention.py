"""Grouped-query attention over a cache: angles, new keys and values, and what they are for.

Keys are `[K, C / 16, D, 16]`, so that scores of 16 positions are one vector and need no sum across
lanes; values are `[K, C, D]`. Both are written and read in place.
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
    bind,
    build,
    cast,
    exp,
    highest,
    local,
    put,
    side_by_side,
    tokens_of,
    total,
    vector,
    wide,
)
from lfmc.targets.tvm.kernels.rms_norm import normalize

SLOTS = 16  # positions of a block of keys
FAR = -1e30
TILE = 4  # tokens of a call that read keys and values together


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, the size of one, and slots of the cache (a multiple of 16)."""

    queries: int
    keys: int
    dim: int
    slots: int

    @property
    def each(self) -> int:
        """Query heads that share a key head."""
        return self.queries // self.keys

    @property
    def keys_shape(self) -> tuple[int, ...]:
        return (self.keys, self.slots // SLOTS, self.dim, SLOTS)

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.keys, self.slots, self.dim)


def angles(dim: int, tokens: int | None) -> PrimFunc:
    """Cosines and sines `[T, D]` of the tokens' angles, the halves alike, for the position of the
    first int32 `[1]` and steps float32 `[D / 2]`."""
    count = tokens_of(tokens)
    parameters = [
        ("start", (1,), "int32"),
        ("steps", (dim // 2,), "float32"),
        ("cos", (count, dim), "float32"),
        ("sin", (count, dim), "float32"),
    ]

    def body(start: Buffer, steps: Buffer, cos: Buffer, sin: Buffer) -> None:
        with side_by_side(count, tokens) as token, T.serial(0, dim // 2) as at:
            angle = bind(cast(start[0] + token, "float32") * steps[at])
            for table, value in ((cos, bind(tirx.cos(angle))), (sin, bind(tirx.sin(angle)))):
                put(table, value, token, at)
                put(table, value, token, at + dim // 2)

    return build(parameters, body)


def heads_parameters(
    heads: Heads, parts: tuple[Columns, Columns, Columns], dtypes: tuple[str, str], count: Expr
) -> list[Parameter]:
    """Of `write_heads`, on every device."""
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
    """Normalize and turn queries and keys, and write keys and values to the cache.

    Values that hold queries, keys and values among their columns, start, norms `[D]` of `dtypes`,
    angles; caches in place; result the queries `[T, Q D]`.
    """
    count = tokens_of(tokens)
    q, k, dim = heads.queries, heads.keys, heads.dim
    parameters = heads_parameters(heads, parts, dtypes, count)
    starts = [part.start for part in parts]

    def body(
        given_q: Buffer,
        given_k: Buffer,
        given_v: Buffer,
        start: Buffer,
        q_norm: Buffer,
        k_norm: Buffer,
        cos: Buffer,
        sin: Buffer,
        keys: Buffer,
        values: Buffer,
        y: Buffer,
    ) -> None:
        with side_by_side(count, tokens) as token:
            position = bind(start[0] + token)
            with T.serial(0, q) as head:
                turned = _turned(given_q, token, starts[0] + head * dim, q_norm, cos, sin, dim, eps)
                with T.serial(0, dim) as at:
                    put(y, turned(at), token, head * dim + at)
            with T.serial(0, k) as head:
                turned = _turned(given_k, token, starts[1] + head * dim, k_norm, cos, sin, dim, eps)
                block, slot = tirx.floordiv(position, SLOTS), tirx.floormod(position, SLOTS)
                with T.serial(0, dim) as at:
                    put(keys, turned(at), head, block, at, slot)
                with T.serial(0, dim) as at:
                    put(values, given_v[token, starts[2] + head * dim + at], head, position, at)

    return build(parameters, body)


def _turned(
    x: Buffer,
    token: Expr,
    start: Expr,
    norm: Buffer,
    cos: Buffer,
    sin: Buffer,
    dim: int,
    eps: float,
) -> Callable[[Expr], Expr]:
    """A head, normalized: reads of it after its turn."""
    whole = T.alloc_buffer((1, dim), "float32")
    normalize(x, token, start, norm, dim, eps, whole, 0, 0)
    half = dim // 2

    def read(at: Expr) -> Expr:
        other = whole[0, tirx.floormod(at + half, dim)]
        other = tirx.Select(at < half, tirx.const(0.0, "float32") - other, other)
        return whole[0, at] * cos[token, at] + other * sin[token, at]

    return read


def attend_parameters(heads: Heads, count: Expr) -> list[Parameter]:
    """Of `attend`, on every device."""
    shape = (count, heads.queries * heads.dim)
    return [
        ("q", shape, "float32"),
        ("start", (1,), "int32"),
        ("keys", heads.keys_shape, "float32"),
        ("values", heads.values_shape, "float32"),
        ("y", shape, "float32"),
    ]


def attend(heads: Heads, window: int, tokens: int | None) -> PrimFunc:
    """Queries `[T, Q D]`, start and caches; result `[T, Q D]`. `window` is how many positions are
    seen, 0 for all."""
    count = tokens_of(tokens)
    parameters = attend_parameters(heads, count)
    tile = 1 if tokens == 1 else TILE

    def body(q: Buffer, start: Buffer, keys: Buffer, values: Buffer, y: Buffer) -> None:
        tiles = tirx.floordiv(count + (tile - 1), tile)
        with T.parallel(0, tiles * heads.keys) as task:
            # Late tokens see most: threads get early and late ones alike.
            head, first = tirx.floordiv(task, tiles), tirx.floormod(task, tiles) * tile
            head, first = bind(head), bind(first)
            rows = [
                (bind(tirx.min(first + index, count - 1)), head * heads.each + each)
                for index in range(tile)
                for each in range(heads.each)
            ]
            _attend(heads, window, rows, head, q, start, keys, values, y)

    return build(parameters, body)


def _attend(
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
    """Some pairs of token and query head, that share a key head."""
    dim, slots = heads.dim, heads.slots
    scores = T.alloc_buffer((len(rows), slots), "float32")
    positions = [bind(start[0] + token) for token, _ in rows]
    lows = [
        tirx.max(at - (window - 1), 0) if window else tirx.const(0, "int32") for at in positions
    ]
    low = bind(lows[0])
    begin = bind(tirx.floordiv(low, SLOTS))
    end = bind(tirx.floordiv(positions[-1], SLOTS) + 1)
    most = local(len(rows) * LANES)
    for index in range(len(rows)):
        put(most, wide(FAR), index * LANES)
    with T.serial(0, end - begin) as step:
        block = bind(begin + step)
        sums = local(len(rows) * LANES)
        for index in range(len(rows)):
            put(sums, wide(0.0), index * LANES)
        with T.serial(0, dim) as at:
            key = bind(vector(keys, head, block, at, 0))
            for index, (token, own) in enumerate(rows):
                part = key * wide(q[token, own * dim + at])
                put(sums, vector(sums, index * LANES) + part, index * LANES)
        slot = bind(wide(block * SLOTS) + tirx.Ramp(tirx.const(0, "int32"), 1, LANES))
        for index, position in enumerate(positions):
            seen = slot <= wide(position)
            if window:
                seen = tirx.And(seen, slot >= wide(lows[index]))
            scaled = vector(sums, index * LANES) * wide(dim**-0.5)
            score = bind(tirx.Select(seen, scaled, wide(FAR)))
            put(scores, score, index, block * SLOTS)
            put(most, tirx.max(vector(most, index * LANES), score), index * LANES)
    shares = []
    for index in range(len(rows)):
        peak = bind(wide(highest(most, index * LANES)))
        sums = local(LANES)
        put(sums, wide(0.0), 0)
        with T.serial(0, end - begin) as step:
            at = (begin + step) * SLOTS
            value = bind(exp(vector(scores, index, at) - peak))
            # e^-87 is not 0, so what is not seen is taken out by hand.
            value = bind(tirx.Select(vector(scores, index, at) > wide(FAR / 2), value, wide(0.0)))
            put(scores, value, index, at)
            put(sums, vector(sums, 0) + value, 0)
        shares.append(bind(tirx.const(1.0, "float32") / total(sums)))
    last = bind(positions[-1] + 1)
    for piece in range(0, dim, PIECE):
        width = min(PIECE, dim - piece)
        mixed = local(len(rows) * width)
        for index in range(len(rows)):
            for at in range(0, width, LANES):
                put(mixed, wide(0.0), index * width + at)
        with T.serial(0, last - low) as step:
            position = bind(low + step)
            for at in range(0, width, LANES):
                value = bind(vector(values, head, position, piece + at))
                for index in range(len(rows)):
                    place = index * width + at
                    part = value * wide(scores[index, position])
                    put(mixed, vector(mixed, place) + part, place)
        for index, (token, own) in enumerate(rows):
            for at in range(0, width, LANES):
                value = vector(mixed, index * width + at) * wide(shares[index])
                put(y, value, token, own * dim + piece + at)


PIECE = 32  # columns of values at once: more sums would not fit the registers
