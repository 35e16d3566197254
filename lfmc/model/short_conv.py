"""The gated short convolution, which makes LFMs fast on small devices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.model.config import DecoderConfig


class ShortConv(nn.Module):
    """`out_proj(C * causal_conv(B * x))`, where `B, C, x = in_proj(hidden)`; a depthwise conv."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.conv_bias
        self.conv = nn.Conv1d(size, size, config.conv_kernel, groups=size, bias=bias)
        self.in_proj = nn.Linear(size, 3 * size, bias=bias)
        self.out_proj = nn.Linear(size, size, bias=bias)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output `[B, T, H]` for `x` `[B, T, H]`, and the new state.

        `state` `[B, H, kernel - 1]` contains the last inputs of the filter.
        """
        gate, out_gate, value = self.in_proj(x).transpose(1, 2).chunk(3, dim=1)  # (B, H, T) each
        inputs = torch.cat([state, gate * value], dim=2)  # (B, H, kernel - 1 + T)
        mixed = F.conv1d(inputs, self.conv.weight, self.conv.bias, groups=inputs.shape[1])
        y = self.out_proj((out_gate * mixed).transpose(1, 2))
        return y, inputs[:, :, -state.shape[2] :]
