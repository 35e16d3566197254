"""Inputs and outputs of a graph for a number of tokens; the host keeps the states and the tables.

A graph reads the states before the call, and returns the values that its tokens add to them. The
host writes these values to the states. So no operator of a graph writes at an index that depends on
data, and the host may pad a call with tokens, whose results it drops.

    hidden          [1, T, H]       embeddings of the tokens
    cos_*, sin_*    [T, D / 2]      of the tokens' positions, for each kind of attention layer
    mask, mask_W    [T, C + T]      0 for a visible slot or token, else MASKED; W is the window
    conv_L          [1, H, taps-1]  last inputs of a filter; as an output, the inputs of T tokens
    key_L           [K, D, C]       slots of a cache; as an output, T slots
    value_L         [K, C, D]
    logits          [1, T, V]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lfmc.model import DecoderConfig, StateSpec, state_specs
from lfmc.model.rope import inverse_frequencies

MASKED = -64.0  # added to scores: a factor of e^-64 in the softmax


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of the graph for calls of `tokens`, with caches of `context` slots.

    `rotary` contains the rotary frequencies of each kind of attention layer.
    """

    hidden_size: int
    vocab_size: int
    head_dim: int
    rotary: Mapping[str, Sequence[float]]
    states: tuple[StateSpec, ...]
    context: int
    tokens: int

    @classmethod
    def from_config(cls, config: DecoderConfig, context: int, tokens: int) -> Interface:
        rotary = {kind: inverse_frequencies(config, kind).tolist() for kind in config.rope}
        sizes = config.hidden_size, config.vocab_size, config.head_dim
        return cls(*sizes, rotary, state_specs(config, 1, context), context, tokens)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Interface:
        """Return the interface of parsed JSON, the inverse of `dataclasses.asdict`."""
        states = (StateSpec(**{**s, "shape": tuple(s["shape"])}) for s in fields["states"])
        return cls(**{**fields, "states": tuple(states)})

    def with_tokens(self, tokens: int) -> Interface:
        """Return the interface for calls of another length."""
        return replace(self, tokens=tokens)

    @property
    def windows(self) -> tuple[int, ...]:
        """Window sizes of attention, 0 for no window; each has its own mask."""
        return tuple(dict.fromkeys(s.window or 0 for s in self.states if s.kind == "key"))

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the order of a graph's inputs."""
        count = self.tokens
        angles, mask = (count, self.head_dim // 2), (count, self.context + count)
        shapes: dict[str, tuple[int, ...]] = {"hidden": (1, count, self.hidden_size)}
        for kind in self.rotary:
            shapes |= {f"cos_{kind}": angles, f"sin_{kind}": angles}
        shapes |= {mask_name(window): mask for window in self.windows}
        return shapes | {s.identifier: self.state_shape(s, self.context) for s in self.states}

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the order of a graph's outputs."""
        updates = {f"{s.identifier}_new": self.new_shape(s) for s in self.states}
        return {"logits": (1, self.tokens, self.vocab_size), **updates}

    def state_shape(self, spec: StateSpec, slots: int) -> tuple[int, ...]:
        """Return the shape of a filter's state, or of a cache with `slots` slots."""
        if spec.kind == "conv":
            return spec.shape
        _, heads, _, dim = spec.shape
        return (heads, dim, slots) if spec.kind == "key" else (heads, slots, dim)

    def new_shape(self, spec: StateSpec) -> tuple[int, ...]:
        """Return the shape of the values that a call adds to a state."""
        if spec.kind == "conv":
            return (*spec.shape[:2], self.tokens)
        return self.state_shape(spec, self.tokens)

    def tables(self, start: int) -> Mapping[str, Tensor]:
        """Return float32 cosines, sines and masks for the tokens from position `start`."""
        positions = torch.arange(start, start + self.tokens)
        tables: dict[str, Tensor] = {}
        for kind, frequencies in self.rotary.items():
            angles = positions[:, None].float() * torch.tensor(frequencies)
            tables |= {f"cos_{kind}": angles.cos(), f"sin_{kind}": angles.sin()}
        # Written slots, then the tokens of this call. Empty slots get a position after them all.
        slots = torch.arange(self.context)
        key_positions = torch.cat(
            [torch.where(slots < start, slots, start + self.tokens), positions]
        )
        for window in self.windows:
            visible = key_positions <= positions[:, None]
            if window:
                visible &= key_positions > positions[:, None] - window
            tables[mask_name(window)] = torch.where(visible, 0.0, MASKED)
        return tables


def mask_name(window: int) -> str:
    return f"mask_{window}" if window else "mask"


def time_dim(spec: StateSpec) -> int:
    """Return the dim of a state that counts tokens."""
    return 1 if spec.kind == "value" else 2


def update_state(spec: StateSpec, state: Tensor, new: Tensor, start: int, count: int) -> Tensor:
    """Return a state after a call of `count` tokens and padding, from position `start`.

    Caches are written in place.
    """
    dim = time_dim(spec)
    added = new.narrow(dim, 0, count)
    if spec.kind == "conv":
        return torch.cat([state, added], dim)[..., -state.shape[dim] :]
    state.narrow(dim, start, count).copy_(added)
    return state
