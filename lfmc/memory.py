"""Memory: of a conversation, which is what these models are small in, and of a whole model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod

from lfmc.checkpoint import Checkpoint
from lfmc.errors import UnsupportedError
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


def installed_nbytes() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(checkpoint: Checkpoint, bytes_per_param: int, what: str, todo: str) -> None:
    """Raise `UnsupportedError`, with both numbers, where `what` needs more than is installed."""
    needed, installed = bytes_per_param * checkpoint.num_params, installed_nbytes()
    if needed > installed:
        raise UnsupportedError(
            f"{what} holds the whole model in memory, and this one does not fit",
            where=checkpoint.path,
            expected=f"{needed / 2**30:.1f} GiB ({bytes_per_param} bytes a parameter)",
            got=f"{installed / 2**30:.1f} GiB installed",
            todo=todo,
        )
