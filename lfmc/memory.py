"""Memory of a conversation: what these models are small in."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from lfmc.model import DecoderConfig, state_specs

FLOAT32 = 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes of float32 states: attention's grow with the context, the convolutions' do not."""

    attention: int
    conv: int


def state_nbytes(config: DecoderConfig, context: int) -> StateBytes:
    """States of one conversation of `context` tokens."""
    sizes = {"attention": 0, "conv": 0}
    for state in state_specs(config, 1, context):
        kind = "conv" if state.kind == "conv" else "attention"
        sizes[kind] += FLOAT32 * prod(state.shape)
    return StateBytes(**sizes)
