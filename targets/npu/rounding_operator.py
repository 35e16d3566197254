"""Rounding as an operator of a traced graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple

import torch
from torch import Tensor

from lfmc.targets.npu.forms import RoundValue
from lfmc.targets.npu.static_ranges import Step


@torch.library.custom_op("lfm_npu::round", mutates_args=())
def round_to(x: Tensor, scale: float, zero: int, bits: int, signed: bool) -> Tensor:
    """Round `x` to the nearest step (`lfmc.targets.npu.static_ranges.Step`)."""
    return Step(scale, zero, bits, signed).round(x)


@round_to.register_fake
def _(x: Tensor, scale: float, zero: int, bits: int, signed: bool) -> Tensor:
    return torch.empty_like(x)


def insert_rounding(steps: Mapping[str, Step]) -> RoundValue:
    """Return a function that inserts a rounding operator for every value."""

    def round_value(value: Tensor, name: str) -> Tensor:
        rounded: Tensor = round_to(value, *astuple(steps[name]))
        return rounded

    return round_value
