"""How n-bit matrices lie in the parameters: blocks of 16 rows, a group's codes cut into eighths.

A vector of 16 lanes takes one byte of each of 16 rows. A group of columns has `bits` units of an
eighth of its size: byte s of a unit holds codes of columns s of several eighths. Widths that do not
divide 8 are cut into planes: 3 bits are 2 and 1, 6 bits 4 and 2; a plane of p bits has p units, and
eighth `e` is field `e // p` of unit `e % p` (see `fields`).

    codes   uint8 [N / 16, G, bits, group / 8, 16]
    scales  float16 [N / 16, G, 16]
    zeros   uint8 [N / 16, G, bits, 1, 2]           the same of 16 lanes: eighths of two

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
    """A piece of a code: bits `[shift, shift + width)` of a unit's bytes, worth 2^`power` each."""

    unit: int
    shift: int
    width: int
    power: int


def fields(bits: int, eighth: int) -> Iterator[Field]:
    """The pieces of the codes of an eighth, one for each plane."""
    done = 0
    for width in PLANES[bits]:
        yield Field(done + eighth % width, width * (eighth // width), width, done)
        done += width


def pack_codes(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes uint8 `[N, K]` in the order above: uint8 `[N / 16, K / group, bits, group / 8, 16]`."""
    blocks = codes.view(-1, ROWS, codes.shape[1] // group, EIGHTHS, group // EIGHTHS)
    return _pack(blocks.permute(0, 2, 3, 4, 1), bits)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 `[N, K]`."""
    blocks = _unpack(packed, bits)
    return blocks.permute(0, 4, 1, 2, 3).flatten(2).flatten(0, 1)


def pack_groups(values: Tensor) -> Tensor:
    """A value of each row and group `[N, G]`: `[N / 16, G, 16]`."""
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor) -> Tensor:
    """The inverse of `pack_groups`: `[N, G]`."""
    return packed.transpose(1, 2).flatten(0, 1)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points uint8 `[N, G]`: uint8 `[N / 16, G, bits, 1, 2]`."""
    lanes = pack_groups(zeros).unflatten(-1, (EIGHTHS, 1, ROWS // EIGHTHS))
    return _pack(lanes, bits)


def unpack_zeros(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_zeros`: uint8 `[N, G]`."""
    return unpack_groups(_unpack(packed, bits).flatten(-3))


def _pack(eighths: Tensor, bits: int) -> Tensor:
    """`[N / 16, G, 8, ...]` of codes, `[N / 16, G, bits, ...]` of bytes."""
    units = [torch.zeros_like(eighths[:, :, 0]) for _ in range(bits)]
    for eighth in range(EIGHTHS):
        for own in fields(bits, eighth):
            piece = (eighths[:, :, eighth] >> own.power) & ((1 << own.width) - 1)
            units[own.unit] |= piece << own.shift
    return torch.stack(units, 2)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    units: Sequence[Tensor] = packed.unbind(2)
    eighths = []
    for eighth in range(EIGHTHS):
        code = torch.zeros_like(units[0])
        for own in fields(bits, eighth):
            code |= ((units[own.unit] >> own.shift) & ((1 << own.width) - 1)) << own.power
        eighths.append(code)
    return torch.stack(eighths, 2)
