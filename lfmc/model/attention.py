"""Grouped-query attention over an explicit cache, with normalized queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.model.config import DecoderConfig
from lfmc.model.norm import RmsNorm
from lfmc.model.rope import rotate

CACHE_WRITES = ("index_copy", "scatter", "one_hot")


def write_cache(cache: Tensor, new: Tensor, positions: Tensor, method: str) -> Tensor:
    """Return a copy of `cache` `[B, K, C, D]` with `new` `[B, K, T, D]` at `positions` `[T]`.

    `method` is one of `CACHE_WRITES`. All three return the same tensor; they differ in the
    operators that a target must support.
    """
    if method == "index_copy":
        return cache.index_copy(2, positions, new)
    if method == "scatter":
        index = positions.view(1, 1, -1, 1).expand(new.shape)
        return cache.scatter(2, index, new)
    if method != "one_hot":
        raise ValueError(f"unknown cache write {method!r}, expected one of {CACHE_WRITES}")
    slots = torch.arange(cache.shape[2], device=cache.device).unsqueeze(1)
    one_hot = (slots == positions).to(cache.dtype)  # (C, T)
    keep = 1.0 - one_hot.sum(1).view(1, 1, -1, 1)
    return cache * keep + one_hot @ new


def attention_mask(positions: Tensor, context: int, window: int | None) -> Tensor:
    """Return the causal mask, bool `[T, C]`: True where a position `[T]` attends to a cache slot.

    With a `window`, a position attends only to the last `window` slots, including its slot.
    """
    slots = torch.arange(context, device=positions.device).unsqueeze(0)
    queries = positions.unsqueeze(1)
    causal = slots <= queries
    return causal if window is None else causal & (slots > queries - window)


class Attention(nn.Module):
    """Grouped-query attention with q/k norm and rotary embedding; lfm3 adds a gate per head."""

    def __init__(self, config: DecoderConfig, cache_write: str) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.cache_write = config.head_dim, cache_write
        self.names = names = config.attention_names
        size, bias = config.hidden_size, config.attention_bias
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(size, inner, bias=bias)
        self.k_proj = nn.Linear(size, kv_inner, bias=bias)
        self.v_proj = nn.Linear(size, kv_inner, bias=bias)
        self.add_module(names.out, nn.Linear(inner, size, bias=bias))
        self.add_module(names.q_norm, RmsNorm(self.head_dim, config.norm_eps))
        self.add_module(names.k_norm, RmsNorm(self.head_dim, config.norm_eps))
        if config.attention_gate:
            self.gate_proj = nn.Linear(size, self.heads, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output `[B, T, H]` and the new caches `[B, K, C, D]`.

        `x` is `[B, T, H]`, `mask` bool `[T, C]`, `keys` and `values` are `[B, K, C, D]`.
        """
        q_norm, k_norm = getattr(self, self.names.q_norm), getattr(self, self.names.k_norm)
        q = q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k = k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, -1))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        keys = write_cache(keys, k, positions, self.cache_write)
        values = write_cache(values, v, positions, self.cache_write)
        y = attend(q, keys, values, mask)  # (B, T, heads, D)
        if hasattr(self, "gate_proj"):
            y = y * torch.sigmoid(self.gate_proj(x)).unsqueeze(-1)
        return getattr(self, self.names.out)(y.flatten(2)), keys, values


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of `q` `[B, heads, T, D]` on `[B, K, C, D]`; return `[B, T, heads, D]`.

    Queries that share a key head are rows of one matmul, because broadcasting would copy the keys
    for each query head.
    """
    groups = q.shape[1] // keys.shape[1]
    rows = q.unflatten(1, (keys.shape[1], groups)).flatten(2, 3)  # (B, K, heads / K * T, D)
    scores = (rows @ keys.transpose(2, 3)).unflatten(2, (groups, -1)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)  # (B, K, heads / K, T, C)
    probabilities = F.softmax(scores.float(), dim=-1).to(q.dtype)
    mixed: Tensor = (probabilities.flatten(2, 3) @ values).unflatten(2, (groups, -1))
    return mixed.flatten(1, 2).transpose(1, 2)
