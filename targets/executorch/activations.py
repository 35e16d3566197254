"""Activation rounding of XNNPACK's kernels with dynamic quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from lfmc.targets.shared.rounded_operators import RoundedOperators


def round_rows(x: Tensor) -> Tensor:
    """Round every row of `[..., K]` to 256 steps between its minimum and maximum, 0 included.

    The operations are in the order of XNNPACK's own arithmetic
    (`xnn_f32_qd8_asymmetric_quantization_params`), so that few values round differently.
    """
    minimum = x.amin(-1, keepdim=True).clamp(max=0)
    maximum = x.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.where(minimum == maximum, 1.0, 255 / (maximum - minimum))  # steps per unit
    low, high = -128 - minimum * scale, 127 - maximum * scale
    zero_point = torch.where(minimum * scale + maximum * scale > 1, low, high)
    zero_point = zero_point.round().clamp(-128, 127)
    codes = (x * scale).round().add(zero_point).clamp(-128, 127)
    return (codes - zero_point) * (1 / scale)


ROUNDED = RoundedOperators(lambda x, group: round_rows(x))
