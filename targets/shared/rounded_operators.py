"""Operators in torch whose n-bit products round their inputs as in a runtime."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.reference.operators import Matrix, NbitMatrix, Operators

Round = Callable[[Tensor, int], Tensor]


def round_groups(x: Tensor, group: int) -> Tensor:
    """Round each `group` values of the rows of `x` `[..., K]` to symmetric int8, and dequantize."""
    codes, step = group_codes(x, group)
    rounded: Tensor = (torch.round(codes) * step).flatten(-2)
    return rounded[..., : x.shape[-1]]


def group_codes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the unrounded codes `[..., groups, group]` of `x` and the step of each group."""
    groups: Tensor = F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    peak = groups.abs().amax(-1, keepdim=True)
    return groups * torch.where(peak > 0, 127.0 / peak, 0.0), peak / 127.0


class RoundedOperators(Operators):
    """Operators that round the inputs of n-bit products, including those of experts.

    `round(x, group)` rounds an input; `group` columns of the weight share a scale.
    """

    def __init__(self, round: Round) -> None:
        self._round = round

    def product(self, x: Tensor, matrix: Matrix) -> Tensor:
        if isinstance(matrix, NbitMatrix):
            x = self._round(x, matrix.group)
        return super().product(x, matrix)


ROUNDED = RoundedOperators(round_groups)
