"""What a graph of so many tokens takes and gives; the host keeps the states and the tables.

A graph reads states as they were before the call, and gives what its tokens add to them: the host
writes that where it belongs. So no operator of a graph writes at a place that depends on data,
and a call may be filled up with tokens that count for nothing.

    hidden          [1, T, H]       embeddings of the tokens
    cos_*, sin_*    [T, D / 2]      of the tokens' positions, for each kind of attention layer
    mask, mask_W    [T, C + T]      0 for a slot or token that is seen, else MASKED; W is a window
    conv_L          [1, H, taps-1]  last inputs of a filter, and in outputs those of T tokens
    key_L           [K, D, C]       slots of a cache; in outputs T of them
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

MASKED = -64.0  # on scores: e^-64 of what is seen


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of the graph for calls of `tokens`, with `context` slots of caches.
    `rotary` has the steps of each kind of attention layer."""

    hidden_size: int
    vocab_size: int
    head_dim: int
    rotary: Mapping[str, Sequence[float]]
    states: tuple[StateSpec, ...]
    context: int
    tokens: int

    @classmethod
    def of(cls, config: DecoderConfig, context: int, tokens: int) -> Interface:
        rotary = {kind: inverse_frequencies(config, kind).tolist() for kind in config.rope}
        sizes = config.hidden_size, config.vocab_size, config.head_dim
        return cls(*sizes, rotary, state_specs(config, 1, context), context, tokens)

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> Interface:
        """The inverse of `dataclasses.asdict`, by way of JSON."""
        states = (StateSpec(**{**s, "shape": tuple(s["shape"])}) for s in held["states"])
        return cls(**{**held, "states": tuple(states)})

    def of_tokens(self, tokens: int) -> Interface:
        """The same for calls of another length."""
        return replace(self, tokens=tokens)

    @property
    def windows(self) -> tuple[int, ...]:
        """How far attention looks back, 0 for everything: a mask for each."""
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
        news = {f"{s.identifier}_new": self.new_shape(s) for s in self.states}
        return {"logits": (1, self.tokens, self.vocab_size), **news}

    def state_shape(self, spec: StateSpec, slots: int) -> tuple[int, ...]:
        """Of a filter's inputs, or of a cache of some slots."""
        if spec.kind == "conv":
            return spec.shape
        _, heads, _, dim = spec.shape
        return (heads, dim, slots) if spec.kind == "key" else (heads, slots, dim)

    def new_shape(self, spec: StateSpec) -> tuple[int, ...]:
        """Of what the tokens of a call add to a state."""
        if spec.kind == "conv":
            return (*spec.shape[:2], self.tokens)
        return self.state_shape(spec, self.tokens)

    def tables(self, start: int) -> Mapping[str, Tensor]:
        """Angles and masks for tokens from position `start` on, float32."""
        positions = torch.arange(start, start + self.tokens)
        found: dict[str, Tensor] = {}
        for kind, steps in self.rotary.items():
            angles = positions[:, None].float() * torch.tensor(steps)
            found |= {f"cos_{kind}": angles.cos(), f"sin_{kind}": angles.sin()}
        # Slots that were written, then the tokens of this call.
        slots = torch.arange(self.context)
        places = torch.cat([torch.where(slots < start, slots, start + self.tokens), positions])
        for window in self.windows:
            seen = places <= positions[:, None]
            if window:
                seen &= places > positions[:, None] - window
            found[mask_name(window)] = torch.where(seen, 0.0, MASKED)
        return found


def mask_name(window: int) -> str:
    return f"mask_{window}" if window else "mask"


def time_dim(spec: StateSpec) -> int:
    """Which dim of a state counts tokens."""
    return 1 if spec.kind == "value" else 2


def carried(spec: StateSpec, state: Tensor, new: Tensor, start: int, count: int) -> Tensor:
    """A state behind a call of which `count` tokens from position `start` on were meant; caches
    are written in place."""
    dim = time_dim(spec)
    kept = new.narrow(dim, 0, count)
    if spec.kind == "conv":
        return torch.cat([state, kept], dim)[..., -state.shape[dim] :]
    state.narrow(dim, start, count).copy_(kept)
    return state
