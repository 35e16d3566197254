"""Codes out of packed bytes, as float32, by the arithmetic that a dialect has."""

from __future__ import annotations

from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from lfmc.targets.mlir.layout import EIGHTHS, PLANES, ROWS, fields


class Unpacking(Protocol):
    dtype: str  # of bytes

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


class ByShifts:
    """Integers, where a compiler takes shifts."""

    dtype = "uint8"

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


class ByFloats:
    """Floats: torch-mlir takes no shifts to TOSA and StableHLO. Exact, as all numbers are small.

    TOSA's bytes are signed.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

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
