"""Arithmetic that depends on the dialect and the device.

It unpacks narrow parameters to float32, by shifts, by floats or from 32-bit words, and writes into
caches.
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

# Returns the parameter of a name; the function computes its value.
LoadTable = Callable[[str, Callable[[], Tensor]], Tensor]


class Arithmetic(Protocol):
    """The operations that have several implementations."""

    dtype: str  # of prepared zero points, one per element
    sums: bool  # products of one token are sums over codes; else they are matmuls

    def as_argument(self, parameter: Parameter) -> Parameter:
        """Return the dtype and shape in which functions take a parameter of the file."""

    def widen_halves(self, value: Tensor, dtype: str, table: LoadTable) -> Tensor:
        """Convert a parameter of 16-bit floats to float32."""

    def prepare_zeros(self, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
        """Unpack zero points to one per element, `[..., G, 16]`.

        Their shape in the file is `[..., G, bits, 1, 2]`.
        """

    def unpack_eighth(self, units: Tensor, bits: int, eighth: int) -> Tensor:
        """Unpack the codes of an eighth, float32 `[..., S, L]`, from bytes `[..., bits, S, L]`."""

    def unpack(self, units: Tensor, bits: int) -> Tensor:
        """Unpack the codes of all eighths, `[..., 8, S, L]`."""

    def widen_zeros(self, value: Tensor) -> Tensor:
        """Convert prepared zero points to float32, 0 to 255."""

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block of 16 rows and the lane in it, of row indices int32."""

    def select_lane(self, rows: Tensor, lane: Tensor) -> Tensor:
        """Select one lane int32 `[T]` of each block `[T, K, 16]`: `[T, K]`."""

    def put(self, cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
        """Return `cache` with `new` written at `start` int32 `[1]` along a dim."""


@torch.library.custom_op("lfm_mlir::put", mutates_args=())
def put(cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
    """Return `cache` with `new` at `start` along a dim.

    A traced graph contains this operator until `replace_puts_by_slices`.
    """
    slots = torch.arange(new.shape[dim]) + start
    return cache.index_copy(dim, slots, new)


@put.register_fake
def _(cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
    return torch.empty_like(cache)


def put_by_select(cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
    """Return the result of `put`, with every element of the cache written again."""
    count, shape = new.shape[dim], [1] * cache.ndim
    shape[dim] = cache.shape[dim]
    slots = torch.arange(cache.shape[dim], dtype=torch.int32) - start
    if count == 1:
        return torch.where((slots == 0).view(shape), new, cache)
    inside = ((slots >= 0) & (slots < count)).view(shape)
    return torch.where(inside, new.index_select(dim, slots.clamp(0, count - 1)), cache)


def select_lane_by_mask(rows: Tensor, lane: Tensor) -> Tensor:
    """Select one lane of each block by a sum in which the other lanes are multiplied by 0."""
    mask = torch.arange(ROWS, dtype=torch.int32) == lane[:, None]
    return (rows * mask.float()[:, None]).sum(-1)


def replace_puts_by_slices(graph: fx.Graph) -> None:
    """Replace every `put` of a graph by ATen operators whose start is a run-time value.

    Tracing can't produce them. torch-mlir lowers them to a slice that can be written in place.
    """
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


class ShiftArithmetic:
    """Integer shifts, for dialects that support them; with `slices` caches are written in place."""

    dtype = "uint8"

    def __init__(self, *, slices: bool = True, sums: bool = True) -> None:
        self._slices, self.sums = slices, sums

    def as_argument(self, parameter: Parameter) -> Parameter:
        return parameter

    def widen_halves(self, value: Tensor, dtype: str, table: LoadTable) -> Tensor:
        return value.float()

    def prepare_zeros(self, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
        return self.unpack(packed, bits).flatten(-3).to(torch.uint8)

    def to_integers(self, units: Tensor) -> Tensor:
        """Convert bytes to int32."""
        return units.to(torch.int32)

    def unpack_eighth(self, units: Tensor, bits: int, eighth: int) -> Tensor:
        parts = []
        for field in fields(bits, eighth):
            value = self.to_integers(units.select(-3, field.unit))
            value = value >> field.shift if field.shift else value
            value = value & ((1 << field.width) - 1) if field.shift + field.width < 8 else value
            parts.append(value * (1 << field.power) if field.power else value)
        return reduce(torch.add, parts).float()

    def unpack(self, units: Tensor, bits: int) -> Tensor:
        power, parts = 0, []
        for width in PLANES[bits]:
            count = EIGHTHS // width
            plane = self.to_integers(units.narrow(-3, power, width)).unsqueeze(-4)
            shifts = torch.arange(count, dtype=torch.int32).view(count, 1, 1, 1) * width
            value = torch.bitwise_right_shift(plane, shifts) & ((1 << width) - 1)
            parts.append(value.flatten(-4, -3) * (1 << power))
            power += width
        return reduce(torch.add, parts).float()

    def widen_zeros(self, value: Tensor) -> Tensor:
        return value.float()

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows >> 4, rows & (ROWS - 1)

    def select_lane(self, rows: Tensor, lane: Tensor) -> Tensor:
        return select_lane_by_mask(rows, lane)

    def put(self, cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
        result: Tensor = (
            put(cache, new, start, dim) if self._slices else put_by_select(cache, new, start, dim)
        )
        return result


class WordArithmetic(ShiftArithmetic):
    """Bytes and 16-bit floats extracted from 32-bit words.

    For devices whose compiler reads narrower values wrongly. The file is little-endian, so its
    words keep the order of the values.
    """

    dtype = "float32"

    def __init__(self) -> None:
        super().__init__(slices=False)

    def as_argument(self, parameter: Parameter) -> Parameter:
        if parameter.dtype not in ELEMENTS_PER_WORD:
            return parameter
        count, (*outer, last) = ELEMENTS_PER_WORD[parameter.dtype], parameter.shape
        shape = (
            (*outer, last // count) if last % count == 0 else (math.prod(parameter.shape) // count,)
        )
        return replace(parameter, dtype="int32", shape=shape)

    def widen_halves(self, value: Tensor, dtype: str, table: LoadTable) -> Tensor:
        """Convert by integer operations; a table contains the powers of two."""
        fraction, bias = (10, 15) if dtype == "float16" else (7, 127)
        count = 1 << (15 - fraction)
        power = table(
            f"powers.{dtype}",
            lambda: torch.exp2(torch.arange(count).clamp(min=1).double() - bias - fraction).float(),
        )
        bits = _split_words(value, 16)
        exponent = (bits >> fraction) & (count - 1)
        mantissa = bits & ((1 << fraction) - 1)
        mantissa = mantissa + (exponent > 0).to(torch.int32) * (1 << fraction)
        value = mantissa.float() * power.index_select(0, exponent.flatten()).view_as(exponent)
        return torch.where(bits >= 1 << 15, -value, value)

    def prepare_zeros(self, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
        units = _split_words(packed, 8).view(shape)
        return ShiftArithmetic().unpack(units, bits).flatten(-3)

    def to_integers(self, units: Tensor) -> Tensor:
        return _split_words(units, 8)

    def select_lane(self, rows: Tensor, lane: Tensor) -> Tensor:
        """Select by a gather: IREE can't compile a masked sum for Mali."""
        indices = lane.long().view(-1, 1, 1).expand(-1, rows.shape[1], 1)
        return rows.gather(2, indices).squeeze(2)


ELEMENTS_PER_WORD = {"uint8": 4, "float16": 2, "bfloat16": 2}


def _split_words(words: Tensor, bits: int) -> Tensor:
    """Split words int32 `[..., n]` into int32 `[..., n * 32 / bits]`, the lowest bits first."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    parts = torch.bitwise_right_shift(words.unsqueeze(-1), shifts) & ((1 << bits) - 1)
    return parts.flatten(-2)


class FloatArithmetic:
    """Float arithmetic, because torch-mlir lowers no shifts to TOSA and StableHLO.

    It is exact, as all numbers are small. TOSA's bytes are signed.
    """

    def __init__(self, dtype: str, *, sums: bool = True) -> None:
        self.dtype, self.sums = dtype, sums

    def as_argument(self, parameter: Parameter) -> Parameter:
        return replace(parameter, dtype=self.dtype) if parameter.dtype == "uint8" else parameter

    def widen_halves(self, value: Tensor, dtype: str, table: LoadTable) -> Tensor:
        return value.float()

    def prepare_zeros(self, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
        value = self.unpack(packed, bits).flatten(-3)
        if self.dtype == "int8":
            return torch.where(value > 127, value - 256, value).to(torch.int8)
        return value.to(torch.uint8)

    def unpack_eighth(self, units: Tensor, bits: int, eighth: int) -> Tensor:
        parts = []
        for field in fields(bits, eighth):
            value = self.widen_zeros(units.select(-3, field.unit))
            code = torch.floor(value * 2.0**-field.shift) if field.shift else value
            end = field.shift + field.width
            if end < 8:
                code = code - torch.floor(value * 2.0**-end) * 2.0**field.width
            parts.append(code * 2.0**field.power if field.power else code)
        return reduce(torch.add, parts)

    def unpack(self, units: Tensor, bits: int) -> Tensor:
        return torch.stack([self.unpack_eighth(units, bits, index) for index in range(EIGHTHS)], -3)

    def widen_zeros(self, value: Tensor) -> Tensor:
        number = value.float()
        return torch.where(number < 0, number + 256, number) if self.dtype == "int8" else number

    def block_and_lane(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        block = torch.floor(rows.float() / ROWS).to(torch.int32)
        return block, rows - block * ROWS

    def select_lane(self, rows: Tensor, lane: Tensor) -> Tensor:
        return select_lane_by_mask(rows, lane)

    def put(self, cache: Tensor, new: Tensor, start: Tensor, dim: int) -> Tensor:
        return put_by_select(cache, new, start, dim)
