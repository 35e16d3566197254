"""The layout of n-bit matrices: blocks of 16 rows, and the codes of a group in eighths.

A vector of 16 lanes reads one byte of each of 16 rows. A group of columns consists of `bits` units,
each an eighth of the group's size. Byte s of a unit contains the codes of column s of several
eighths. Widths that do not divide 8 are split into planes: 3 bits into 2 and 1 bits, 6 bits into 4
and 2. A plane of p bits has p units, and eighth `e` is field `e // p` of unit `e % p` (see
`fields`).

    codes   uint8 [N / 16, G, bits, group / 8, 16]
    scales  float16 [N / 16, G, 16]
    zeros   uint8 [N / 16, G, bits, 1, 2]           the layout of codes, with eighths of two lanes

No byte is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.targets.shared.row_blocks import PLANES, ROWS

EIGHTHS = 8


@dataclass(frozen=True)
class Field:
    """A part of a code: bits `[shift, shift + width)` of a unit's bytes, times 2^`power`."""

    unit: int
    shift: int
    width: int
    power: int


def fields(bits: int, eighth: int) -> Iterator[Field]:
    """Yield the parts of the codes of an eighth, one for each plane."""
    power = 0
    for width in PLANES[bits]:
        yield Field(power + eighth % width, width * (eighth // width), width, power)
        power += width


def pack_codes(codes: Tensor, bits: int, group: int) -> Tensor:
    """Pack codes uint8 `[N, K]` to uint8 `[N / 16, K / group, bits, group / 8, 16]`."""
    blocks = codes.view(-1, ROWS, codes.shape[1] // group, EIGHTHS, group // EIGHTHS)
    return _pack(blocks.permute(0, 2, 3, 4, 1), bits)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Invert `pack_codes`: uint8 `[N, K]`."""
    blocks = _unpack(packed, bits)
    return blocks.permute(0, 4, 1, 2, 3).flatten(2).flatten(0, 1)


def pack_groups(values: Tensor) -> Tensor:
    """Reorder values per row and group `[N, G]` to `[N / 16, G, 16]`."""
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor) -> Tensor:
    """Invert `pack_groups`: `[N, G]`."""
    return packed.transpose(1, 2).flatten(0, 1)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Pack zero points uint8 `[N, G]` to uint8 `[N / 16, G, bits, 1, 2]`."""
    lanes = pack_groups(zeros).unflatten(-1, (EIGHTHS, 1, ROWS // EIGHTHS))
    return _pack(lanes, bits)


def unpack_zeros(packed: Tensor, bits: int) -> Tensor:
    """Invert `pack_zeros`: uint8 `[N, G]`."""
    return unpack_groups(_unpack(packed, bits).flatten(-3))


def _pack(eighths: Tensor, bits: int) -> Tensor:
    """Pack codes `[N / 16, G, 8, ...]` to bytes `[N / 16, G, bits, ...]`."""
    units = [torch.zeros_like(eighths[:, :, 0]) for _ in range(bits)]
    for eighth in range(EIGHTHS):
        for field in fields(bits, eighth):
            piece = (eighths[:, :, eighth] >> field.power) & ((1 << field.width) - 1)
            units[field.unit] |= piece << field.shift
    return torch.stack(units, 2)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    units: Sequence[Tensor] = packed.unbind(2)
    eighths = []
    for eighth in range(EIGHTHS):
        code = torch.zeros_like(units[0])
        for field in fields(bits, eighth):
            code |= ((units[field.unit] >> field.shift) & ((1 << field.width) - 1)) << field.power
        eighths.append(code)
    return torch.stack(eighths, 2)
