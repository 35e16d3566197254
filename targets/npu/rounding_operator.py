"""A rounding as an operator of a traced graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple

import torch
from torch import Tensor

from lfmc.targets.npu.forms import Keep
from lfmc.targets.npu.static_ranges import Step


@torch.library.custom_op("lfm_npu::round", mutates_args=())
def round_to(x: Tensor, scale: float, zero: int, bits: int, signed: bool) -> Tensor:
    """`x` to the nearest step (`lfmc.targets.npu.static_ranges.Step`)."""
    return Step(scale, zero, bits, signed).rounded(x)


@round_to.register_fake
def _(x: Tensor, scale: float, zero: int, bits: int, signed: bool) -> Tensor:
    return torch.empty_like(x)


def marked(steps: Mapping[str, Step]) -> Keep:
    """Leaves a rounding in the graph wherever a value is kept."""

    def keep(value: Tensor, name: str) -> Tensor:
        made: Tensor = round_to(value, *astuple(steps[name]))
        return made

    return keep
