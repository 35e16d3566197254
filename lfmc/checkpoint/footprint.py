"""Memory that a model takes, by context length, and the check that a job fits on the machine."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import UnsupportedError
from lfmc.machine.memory import installed_nbytes
from lfmc.model import DecoderConfig, state_specs

FLOAT32 = 4
LAYER = re.compile(r"model\.layers\.\d+")
CONTEXTS = (
    512,
    2048,
    8192,
    32768,
    131072,
)  # tokens; the rows that `lfmc inspect` prints


@dataclass(frozen=True)
class StateBytes:
    """Bytes of float32 states. Attention states grow with the context, conv states do not."""

    attention: int
    conv: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of a conversation of `context` tokens: weights as stored, and float32 states.

    `all_attention` estimates the states of a conventional transformer for comparison: a model of
    the same depth and the same heads, with full attention in every layer.
    """

    context: int
    weights: int
    attention: int
    conv: int
    all_attention: int

    @property
    def total(self) -> int:
        return self.weights + self.attention + self.conv

    @property
    def all_attention_total(self) -> int:
        return self.weights + self.all_attention


def state_nbytes(config: DecoderConfig, context: int) -> StateBytes:
    """Return the bytes of the states of one conversation of `context` tokens.

    A layer with a sliding window counts only the positions in its window. An artifact may allocate
    more, because some runtimes keep all positions.
    """
    sizes = {"attention": 0, "conv": 0}
    for state in state_specs(config, 1, context):
        if state.kind == "conv":
            sizes["conv"] += FLOAT32 * prod(state.shape)
        else:
            batch, heads, slots, width = state.shape
            positions = slots if state.window is None else min(slots, state.window)
            sizes["attention"] += FLOAT32 * batch * heads * positions * width
    return StateBytes(**sizes)


def footprint(checkpoint: Checkpoint, context: int) -> Footprint:
    """Return the memory of a checkpoint, as stored, for `context` tokens."""
    config = checkpoint.config
    states = state_nbytes(config, context)
    weights = sum(info.nbytes for info in checkpoint.tensors.values())
    slot = 2 * FLOAT32 * config.num_kv_heads * config.head_dim  # a key and a value
    all_attention = config.num_layers * context * slot
    return Footprint(context, weights, states.attention, states.conv, all_attention)


def footprints(checkpoint: Checkpoint) -> list[Footprint]:
    """Return the memory at each supported length of `CONTEXTS`, or at the maximum if none is."""
    longest = checkpoint.config.max_context
    lengths = [n for n in CONTEXTS if n <= longest] or [longest]
    return [footprint(checkpoint, n) for n in lengths]


def largest_layer(checkpoint: Checkpoint) -> int:
    """Return the parameters of the largest layer, or of the embedding if it is larger."""
    sizes: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        layer = LAYER.match(name)
        sizes[layer[0] if layer else name] += info.numel
    return max(sizes.values())


def require_memory(
    checkpoint: Checkpoint, required_nbytes: int, task: str, todo: str, device: str = "cpu"
) -> None:
    """Raise `UnsupportedError`, with both numbers, if a task needs more bytes than there are."""
    installed = installed_nbytes(device)
    if required_nbytes > installed:
        per_param = required_nbytes / checkpoint.num_params
        place = "on the GPU" if device == "cuda" else "installed"
        raise UnsupportedError(
            f"{task} of this model does not fit in memory",
            where=checkpoint.path,
            expected=f"{required_nbytes / 2**30:.1f} GiB ({per_param:.0f} bytes per parameter)",
            got=f"{installed / 2**30:.1f} GiB {place}",
            todo=todo,
        )
