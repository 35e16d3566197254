"""The decoder: takes tokens and states, returns logits and new states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.model.attention import Attention, attention_mask
from lfmc.model.config import CONV, DecoderConfig
from lfmc.model.experts import SparseMoe
from lfmc.model.mlp import GatedMlp
from lfmc.model.norm import RmsNorm
from lfmc.model.rope import inverse_frequencies, rotation
from lfmc.model.short_conv import ShortConv


class Layer(nn.Module):
    """Short convolution or attention, then feed-forward or experts, each with a residual."""

    def __init__(self, config: DecoderConfig, index: int, cache_write: str) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        if config.layer_types[index] == CONV:
            self.conv = ShortConv(config)
        else:
            self.self_attn = Attention(config, cache_write)
        if config.moe is not None and config.is_moe_layer(index):
            self.feed_forward: nn.Module = SparseMoe(config, config.moe)
        else:
            self.feed_forward = GatedMlp(size, config.ffn_size)
        self.operator_norm, self.ffn_norm = RmsNorm(size, eps), RmsNorm(size, eps)
        if config.sandwich_norm:
            self.post_operator_norm, self.post_ffn_norm = RmsNorm(size, eps), RmsNorm(size, eps)

    def forward(
        self, x: Tensor, attention: tuple[Tensor, ...], states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        h = self.operator_norm(x)
        if hasattr(self, "conv"):
            h, *states = self.conv(h, *states)
        else:
            cos, sin, mask, positions = attention
            h, *states = self.self_attn(h, (cos, sin), mask, positions, *states)
        sandwich = hasattr(self, "post_operator_norm")
        x = x + (self.post_operator_norm(h) if sandwich else h)
        h = self.feed_forward(self.ffn_norm(x))
        return x + (self.post_ffn_norm(h) if sandwich else h), list(states)


class Backbone(nn.Module):
    """The modules under `model.` in a checkpoint: embedding, layers and final norm."""

    def __init__(self, config: DecoderConfig, cache_write: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, cache_write) for i in range(config.num_layers))
        self.embedding_norm = RmsNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """An LFM2, LFM2-MoE or LFM3 language model with explicit state.

    Parameter names are those of the checkpoint. Only the constants `rope.*` are additional.
    """

    def __init__(self, config: DecoderConfig, cache_write: str = "index_copy") -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config, cache_write)
        if not config.tied_embedding:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = nn.Module()
        for kind in config.rope:
            self.rope.register_buffer(kind, inverse_frequencies(config, kind))

    def forward(
        self, tokens: Tensor, positions: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the logits `[B, T, V]` of `tokens` `[B, T]` and the new states.

        `tokens` and `positions` `[T]` are int64, and positions are consecutive. States, old and
        new, are in the order of `lfmc.model.state_specs`.
        """
        hidden, states = self.hidden(tokens, positions, states)
        return self.head(hidden), states

    def hidden(
        self, tokens: Tensor, positions: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the input of the head, `[B, T, H]`, and the new states."""
        context = next((s.shape[2] for s in states if s.dim() == 4), 0)
        attention = attention_inputs(self.config, positions, context, self.rope.get_buffer)
        x = self.model.embed_tokens(tokens)
        new_states: list[Tensor] = []
        for layer, kind in zip(self.model.layers, self.config.layer_types, strict=True):
            start, count = len(new_states), 1 if kind == CONV else 2
            x, layer_states = layer(x, attention.get(kind, ()), states[start : start + count])
            new_states.extend(layer_states)
        return self.model.embedding_norm(x), new_states

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., V]` of normalized hidden states `[..., H]`."""
        if self.config.tied_embedding:
            return F.linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)  # type: ignore[no-any-return]


def attention_inputs(
    config: DecoderConfig,
    positions: Tensor,
    context: int,
    frequencies: Callable[[str], Tensor],
) -> dict[str, tuple[Tensor, ...]]:
    """Return, for each type of attention layer, its inputs besides hidden states and caches.

    They are cosine and sine, float32 `[T, head_dim]`, the bool mask `[T, C]` for caches of
    `context` slots, and `positions` `[T]`.
    """
    return {
        kind: (
            *rotation(positions, frequencies(kind)),
            attention_mask(positions, context, config.window(config.layer_types.index(kind))),
            positions,
        )
        for kind in config.rope
    }


def build_decoder(config: DecoderConfig, cache_write: str = "index_copy") -> Decoder:
    """Return a decoder with parameters on the meta device, for `load_state_dict(assign=True)`."""
    with torch.device("meta"):
        decoder = Decoder(config, cache_write)
    for kind in config.rope:
        decoder.rope.register_buffer(kind, inverse_frequencies(config, kind))
    return decoder.eval().requires_grad_(False)
