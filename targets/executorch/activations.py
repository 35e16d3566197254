"""Activations as XNNPACK's dynamic kernels round them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfmc.graph.program import Program
from lfmc.targets.shared.rounded_program import RoundedActivations


def round_rows(x: Tensor) -> Tensor:
    """Every row of `[..., K]` on 256 steps from its least to its greatest value, 0 among them.

    In the order of XNNPACK's own arithmetic (`xnn_f32_qd8_asymmetric_quantization_params`), so that
    few values fall on the other side of a rounding.
    """
    least = x.amin(-1, keepdim=True).clamp(max=0)
    most = x.amax(-1, keepdim=True).clamp(min=0)
    steps = torch.where(least == most, 1.0, 255 / (most - least))  # in 1
    low, high = -128 - least * steps, 127 - most * steps
    zero = torch.where(least * steps + most * steps > 1, low, high).round().clamp(-128, 127)
    codes = (x * steps).round().add(zero).clamp(-128, 127)
    return (codes - zero) * (1 / steps)


def rounded(program: Program) -> nn.Module:
    """The bound program with the inputs of its n-bit products rounded so."""
    return RoundedActivations(program.module, lambda x, group: round_rows(x))
