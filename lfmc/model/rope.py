"""Rotary position embedding in the half-split layout, computed from positions without tables."""

from __future__ import annotations

import torch
from torch import Tensor

from lfmc.model.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig, layer_type: str) -> Tensor:
    """Return the angle per position of each rotated dim, float32 `[head_dim / 2]`.

    Dims beyond the rotated fraction have frequency 0 and so stay unchanged. This is the
    "proportional" rope of transformers' `modeling_rope_utils`; all else follows Su et al. 2021.
    """
    rope = config.rope[layer_type]
    half = config.head_dim // 2
    rotated = int(rope.partial * config.head_dim // 2)
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.int64).float() / config.head_dim
    return torch.cat([1.0 / rope.theta**exponents, torch.zeros(half - rotated)])


def rotation(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, float32 `[T, head_dim]` each, for `positions` `[T]`."""
    angles = positions.float().unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[..., T, head_dim]` by the angles of `cos` and `sin` `[T, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
