"""What is written in one way for a dialect or a device and in another for the next.

Numbers out of narrow parameters, as float32, by shifts, floats, or out of whole words, and writing
into a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, fx

from lfmc.targets.mlir.layout import EIGHTHS, fields
from lfmc.targets.shared.parameters_file import Parameter
from lfmc.targets.shared.row_blocks import PLANES, ROWS

Table = Callable[[str, Callable[[], Tensor]], Tensor]  # a parameter of a name, once made


class Dialect(Protocol):
    dtype: str  # of zero points, one an element
    sums: bool  # products of one token are sums over codes; else of an unpacked matrix

    def as_given(self, own: Parameter) -> Parameter:
        """What functions take for a parameter of the file."""

    def halves(self, value: Tensor, dtype: str, table: Table) -> Tensor:
        """Float32 of a parameter of floats of 16 bits."""

    def zeros(self, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
        """Zero points, one an element `[..., G, 16]`, of packed ones whose shape in the file is
        `[..., G, bits, 1, 2]`."""

    def eighth(self, units: Tensor, bits: int, eighth: int) -> Tensor:
        """Codes of an eighth, float32 `[..., S, L]`, of units bytes `[..., bits, S, L]`."""

    def spread(self, units: Tensor, bits: int) -> Tensor:
        """All of them, `[..., 8, S, L]`."""

    def number(self, value: Tensor) -> Tensor:
        """Zero points as float32, 0 to 255."""

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where rows int32 lie: a block of 16, and a row of it."""

    def pick(self, rows: Tensor, lane: Tensor) -> Tensor:
        """A lane int32 `[T]` of each of some blocks `[T, K, 16]`: `[T, K]`."""

    def put(self, cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
        """`cache` with `new` at `start` int32 `[1]` of a dim."""


@torch.library.custom_op("lfm_mlir::put", mutates_args=())
def put(cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
    """`cache` with `new` at `start` of a dim: one operator until `with_slices`."""
    at = torch.arange(new.shape[dim]) + start
    return cache.index_copy(dim, at, new)


@put.register_fake
def _(cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
    return torch.empty_like(cache)


def chosen(cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
    """The same, every element of the cache written anew."""
    count, shape = new.shape[dim], [1] * cache.ndim
    shape[dim] = cache.shape[dim]
    slots = torch.arange(cache.shape[dim], dtype=torch.int32) - start
    if count == 1:
        return torch.where((slots == 0).view(shape), new, cache)
    inside = ((slots >= 0) & (slots < count)).view(shape)
    return torch.where(inside, new.index_select(dim, slots.clamp(0, count - 1)), cache)


def masked(rows: Tensor, lane: Tensor) -> Tensor:
    """A lane of each block, all others times zero."""
    own = torch.arange(ROWS, dtype=torch.int32) == lane[:, None]
    return (rows * own.float()[:, None]).sum(-1)


def with_slices(graph: fx.Graph) -> None:
    """Write a graph's `put` with ATen operators whose start is known when it runs, as no tracing
    says it: torch-mlir makes a slice of them that can be written in place."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target != torch.ops.lfm_mlir.put.default:
            continue
        cache, new, start, dim = node.args
        count = new.meta["val"].shape[dim]
        with graph.inserting_before(node):
            first = graph.call_function(aten.item.default, (start,))
            end = graph.call_function(aten.add.int, (first, count))
            slice = graph.call_function(aten.slice_scatter.default, (cache, new, dim, first, end))
        first.meta["val"], end.meta["val"], slice.meta["val"] = 0, count, node.meta["val"]
        node.replace_all_uses_with(slice)
        graph.erase_node(node)


class ByShifts:
    """Integers, where a compiler takes shifts; with `slices` a cache is written in place."""

    dtype = "uint8"

    def __init__(self, *, slices: bool = True, sums: bool = True) -> None:
        self._slices, self.sums = slices, sums

    def as_given(self, own: Parameter) -> Parameter:
        return own

    def halves(self, value: Tensor, dtype: str, table: Table) -> Tensor:
        return value.float()

    def zeros(self, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
        return self.spread(packed, bits).flatten(-3).to(torch.uint8)

    def integers(self, units: Tensor) -> Tensor:
        """Bytes as int32."""
        return units.to(torch.int32)

    def eighth(self, units: Tensor, bits: int, eighth: int) -> Tensor:
        parts = []
        for own in fields(bits, eighth):
            value = self.integers(units.select(-3, own.unit))
            value = value >> own.shift if own.shift else value
            value = value & ((1 << own.width) - 1) if own.shift + own.width < 8 else value
            parts.append(value * (1 << own.power) if own.power else value)
        return reduce(torch.add, parts).float()

    def spread(self, units: Tensor, bits: int) -> Tensor:
        done, parts = 0, []
        for width in PLANES[bits]:
            many = EIGHTHS // width
            own = self.integers(units.narrow(-3, done, width)).unsqueeze(-4)
            shifts = torch.arange(many, dtype=torch.int32).view(many, 1, 1, 1) * width
            value = torch.bitwise_right_shift(own, shifts) & ((1 << width) - 1)
            parts.append(value.flatten(-4, -3) * (1 << done))
            done += width
        return reduce(torch.add, parts).float()

    def number(self, value: Tensor) -> Tensor:
        return value.float()

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows >> 4, rows & (ROWS - 1)

    def pick(self, rows: Tensor, lane: Tensor) -> Tensor:
        return masked(rows, lane)

    def put(self, cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
        made: Tensor = (
            put(cache, new, start, dim) if self._slices else chosen(cache, new, start, dim)
        )
        return made


class ByWords(ByShifts):
    """Bytes and halves are cut out of 32-bit words: for a device whose compiler reads what is
    narrower wrong. Numbers in the file are little-endian, so words of it are in order."""

    dtype = "float32"

    def __init__(self) -> None:
        super().__init__(slices=False)

    def as_given(self, own: Parameter) -> Parameter:
        if own.dtype not in WORD_HOLDS:
            return own
        many, (*before, last) = WORD_HOLDS[own.dtype], own.shape
        shape = (*before, last // many) if last % many == 0 else (math.prod(own.shape) // many,)
        return replace(own, dtype="int32", shape=shape)

    def halves(self, value: Tensor, dtype: str, table: Table) -> Tensor:
        """Widened by integers; powers of two come from a table."""
        fraction, bias = (10, 15) if dtype == "float16" else (7, 127)
        count = 1 << (15 - fraction)
        power = table(
            f"powers.{dtype}",
            lambda: torch.exp2(torch.arange(count).clamp(min=1).double() - bias - fraction).float(),
        )
        bits = _cut(value, 16)
        exponent = (bits >> fraction) & (count - 1)
        whole = (bits & ((1 << fraction) - 1)) + (exponent > 0).to(torch.int32) * (1 << fraction)
        found = whole.float() * power.index_select(0, exponent.flatten()).view_as(exponent)
        return torch.where(bits >= 1 << 15, -found, found)

    def zeros(self, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
        units = _cut(packed, 8).view(shape)
        return ByShifts().spread(units, bits).flatten(-3)

    def integers(self, units: Tensor) -> Tensor:
        return _cut(units, 8)

    def pick(self, rows: Tensor, lane: Tensor) -> Tensor:
        """By a gather: IREE can't compile a masked sum for Mali."""
        places = lane.long().view(-1, 1, 1).expand(-1, rows.shape[1], 1)
        return rows.gather(2, places).squeeze(2)


WORD_HOLDS = {"uint8": 4, "float16": 2, "bfloat16": 2}


def _cut(words: Tensor, bits: int) -> Tensor:
    """Numbers of some bits, lowest first, int32 `[..., n * 32 / bits]` of int32 `[..., n]`."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    parts = torch.bitwise_right_shift(words.unsqueeze(-1), shifts) & ((1 << bits) - 1)
    return parts.flatten(-2)


class ByFloats:
    """Floats: torch-mlir takes no shifts to TOSA and StableHLO. Exact, as all numbers are small.

    TOSA's bytes are signed.
    """

    def __init__(self, dtype: str, *, sums: bool = True) -> None:
        self.dtype, self.sums = dtype, sums

    def as_given(self, own: Parameter) -> Parameter:
        return replace(own, dtype=self.dtype) if own.dtype == "uint8" else own

    def halves(self, value: Tensor, dtype: str, table: Table) -> Tensor:
        return value.float()

    def zeros(self, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
        value = self.spread(packed, bits).flatten(-3)
        if self.dtype == "int8":
            return torch.where(value > 127, value - 256, value).to(torch.int8)
        return value.to(torch.uint8)

    def eighth(self, units: Tensor, bits: int, eighth: int) -> Tensor:
        parts = []
        for own in fields(bits, eighth):
            value = self.number(units.select(-3, own.unit))
            low = torch.floor(value * 2.0**-own.shift) if own.shift else value
            end = own.shift + own.width
            if end < 8:
                low = low - torch.floor(value * 2.0**-end) * 2.0**own.width
            parts.append(low * 2.0**own.power if own.power else low)
        return reduce(torch.add, parts)

    def spread(self, units: Tensor, bits: int) -> Tensor:
        return torch.stack([self.eighth(units, bits, e) for e in range(EIGHTHS)], -3)

    def number(self, value: Tensor) -> Tensor:
        plain = value.float()
        return torch.where(plain < 0, plain + 256, plain) if self.dtype == "int8" else plain

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        block = torch.floor(rows.float() / ROWS).to(torch.int32)
        return block, rows - block * ROWS

    def pick(self, rows: Tensor, lane: Tensor) -> Tensor:
        return masked(rows, lane)

    def put(self, cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
        return chosen(cache, new, start, dim)
