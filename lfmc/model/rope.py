"""Rotary position embedding in the half-split layout, computed from positions without tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfmc.model.config import DecoderConfig, Llama3, Rope, Yarn


def inverse_frequencies(config: DecoderConfig, layer_type: str) -> Tensor:
    """Return the angle per position of each rotated dim, float32 `[head_dim / 2]`.

    Dims beyond the rotated fraction have frequency 0 and so stay unchanged. The scaled kinds are
    those of transformers' `modeling_rope_utils`; all else follows Su et al. 2021.
    """
    rope = config.rope[layer_type]
    half = config.head_dim // 2
    rotated = int(rope.partial * config.head_dim // 2)
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / rope.theta**exponents
    frequencies = torch.cat([frequencies, torch.zeros(half - rotated)]) / rope.factor
    if isinstance(rope.scaling, Yarn):
        return _yarn(frequencies, rope, rope.scaling, config.head_dim)
    if isinstance(rope.scaling, Llama3):
        return _llama3(frequencies, rope.scaling)
    return frequencies


def _yarn(frequencies: Tensor, rope: Rope, scaling: Yarn, head_dim: int) -> Tensor:
    """Interpolate between `frequencies` and those divided by the factor, by a ramp over dims."""

    def dim_with(turns: float) -> float:
        wavelength = scaling.context / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = dim_with(scaling.beta_fast), dim_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 if first == last else 0
    dims = torch.arange(len(frequencies), dtype=torch.float32)
    stays = 1 - torch.clamp((dims - first) / (last - first), 0, 1)
    return frequencies / scaling.factor * (1 - stays) + frequencies * stays


def _llama3(frequencies: Tensor, scaling: Llama3) -> Tensor:
    """Divide frequencies of long wavelengths by the factor, with a smooth transition."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotation(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, float32 `[T, head_dim]` each, for `positions` `[T]`."""
    angles = positions.float().unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[..., T, head_dim]` by the angles of `cos` and `sin` `[T, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
