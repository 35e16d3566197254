"""What is written in one way for a dialect and in another for the next.

Codes out of packed bytes, as float32, by shifts or by floats, and writing into a cache.
"""

from __future__ import annotations

from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, fx

from lfmc.targets.blocks import PLANES, ROWS
from lfmc.targets.mlir.layout import EIGHTHS, fields


class Dialect(Protocol):
    dtype: str  # of bytes
    sums: bool  # products of one token are sums over codes; else of an unpacked matrix

    def eighth(self, units: Tensor, bits: int, eighth: int) -> Tensor:
        """Codes of an eighth, float32 `[..., S, L]`, of units bytes `[..., bits, S, L]`."""

    def spread(self, units: Tensor, bits: int) -> Tensor:
        """All of them, `[..., 8, S, L]`."""

    def number(self, value: Tensor) -> Tensor:
        """Bytes as float32, 0 to 255."""

    def byte(self, value: Tensor) -> Tensor:
        """The inverse of `number`."""

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where rows int32 lie: a block of 16, and a row of it."""

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

    def eighth(self, units: Tensor, bits: int, eighth: int) -> Tensor:
        parts = []
        for own in fields(bits, eighth):
            value = units.select(-3, own.unit).to(torch.int32)
            value = value >> own.shift if own.shift else value
            value = value & ((1 << own.width) - 1) if own.shift + own.width < 8 else value
            parts.append(value * (1 << own.power) if own.power else value)
        return reduce(torch.add, parts).float()

    def spread(self, units: Tensor, bits: int) -> Tensor:
        done, parts = 0, []
        for width in PLANES[bits]:
            many = EIGHTHS // width
            own = units.narrow(-3, done, width).to(torch.int32).unsqueeze(-4)
            shifts = torch.arange(many, dtype=torch.int32).view(many, 1, 1, 1) * width
            value = torch.bitwise_right_shift(own, shifts) & ((1 << width) - 1)
            parts.append(value.flatten(-4, -3) * (1 << done))
            done += width
        return reduce(torch.add, parts).float()

    def number(self, value: Tensor) -> Tensor:
        return value.float()

    def byte(self, value: Tensor) -> Tensor:
        return value.to(torch.uint8)

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows >> 4, rows & (ROWS - 1)

    def put(self, cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
        made: Tensor = (
            put(cache, new, start, dim) if self._slices else chosen(cache, new, start, dim)
        )
        return made


class ByFloats:
    """Floats: torch-mlir takes no shifts to TOSA and StableHLO. Exact, as all numbers are small.

    TOSA's bytes are signed.
    """

    def __init__(self, dtype: str, *, sums: bool = True) -> None:
        self.dtype, self.sums = dtype, sums

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

    def byte(self, value: Tensor) -> Tensor:
        if self.dtype == "int8":
            return torch.where(value > 127, value - 256, value).to(torch.int8)
        return value.to(torch.uint8)

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        block = torch.floor(rows.float() / ROWS).to(torch.int32)
        return block, rows - block * ROWS

    def put(self, cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
        return chosen(cache, new, start, dim)
