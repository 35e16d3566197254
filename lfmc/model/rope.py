"""Rotary position embedding in the half-split layout, computed from positions (no tables)."""

from __future__ import annotations

import torch
from torch import Tensor

from lfmc.model.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig, layer_type: str) -> Tensor:
    """Angular steps of one kind of attention layer, float32 `[head_dim / 2]`.

    Dims beyond the rotated share have step 0, so they pass through (the "proportional" rope of
    transformers' `modeling_rope_utils`; Su et al. 2021 for the rest).
    """
    rope = config.rope[layer_type]
    half = config.head_dim // 2
    turned = int(rope.partial * config.head_dim // 2)
    steps = torch.arange(0, 2 * turned, 2, dtype=torch.int64).float() / config.head_dim
    return torch.cat([1.0 / rope.theta**steps, torch.zeros(half - turned)])


def rotation(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 `[T, head_dim]` each, for `positions` `[T]`."""
    angles = positions.float().unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` `[..., T, head_dim]` by the angles behind `cos` and `sin` `[T, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
