"""Memory: of a conversation, which is what these models are small in, and of a whole model."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from math import prod

import torch

from lfmc.checkpoint import Checkpoint
from lfmc.errors import UnsupportedError
from lfmc.model import DecoderConfig, state_specs

FLOAT32 = 4
M_MMAP_THRESHOLD = -3  # of malloc.h
CONTEXTS = (512, 2048, 8192, 32768, 131072)  # tokens that `lfmc inspect` tells memory for


@dataclass(frozen=True)
class StateBytes:
    """Bytes of float32 states: attention's grow with the context, the convolutions' do not."""

    attention: int
    conv: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of a conversation of `context` tokens: weights as stored, and float32 states.

    `all_attention` estimates the states of a model of the same depth with full attention, of the
    same heads, in every layer: what a conventional transformer would need instead.
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
    """States of one conversation of `context` tokens.

    A layer with a sliding window counts the positions that it looks back at, and no more. (What
    an artifact allocates may be more: some runtimes keep all positions.)
    """
    sizes = {"attention": 0, "conv": 0}
    for state in state_specs(config, 1, context):
        if state.kind == "conv":
            sizes["conv"] += FLOAT32 * prod(state.shape)
        else:
            batch, heads, slots, width = state.shape
            kept = slots if state.window is None else min(slots, state.window)
            sizes["attention"] += FLOAT32 * batch * heads * kept * width
    return StateBytes(**sizes)


def footprint(checkpoint: Checkpoint, context: int) -> Footprint:
    """Memory of a checkpoint, as it is stored, at a context of so many tokens."""
    config = checkpoint.config
    states = state_nbytes(config, context)
    weights = sum(info.numel * info.dtype.itemsize for info in checkpoint.tensors.values())
    slot = 2 * FLOAT32 * config.num_kv_heads * config.head_dim  # a key and a value
    every = config.num_layers * context * slot
    return Footprint(context, weights, states.attention, states.conv, every)


def footprints(checkpoint: Checkpoint) -> list[Footprint]:
    """Memory at each of `CONTEXTS` that the model was made for, or at its longest context."""
    longest = checkpoint.config.max_context
    lengths = [n for n in CONTEXTS if n <= longest] or [longest]
    return [footprint(checkpoint, n) for n in lengths]


def installed_nbytes(device: str = "cpu") -> int:
    """Bytes of memory that this machine, or its first GPU for "cuda", has."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(
    checkpoint: Checkpoint, needed: int, what: str, todo: str, device: str = "cpu"
) -> None:
    """Raise `UnsupportedError`, with both numbers, where `needed` bytes are more than there are."""
    installed = installed_nbytes(device)
    if needed > installed:
        each = needed / checkpoint.num_params
        place = "on the GPU" if device == "cuda" else "installed"
        raise UnsupportedError(
            f"{what} of this model does not fit in memory",
            where=checkpoint.path,
            expected=f"{needed / 2**30:.1f} GiB ({each:.0f} bytes a parameter)",
            got=f"{installed / 2**30:.1f} GiB {place}",
            todo=todo,
        )


def return_freed_memory() -> None:
    """Have large blocks go back to the system when they are freed (glibc; elsewhere they do).

    glibc takes a freed block's size as the new limit below which blocks stay in its heap, up to 32
    MiB, and holes of every size then add up: twice the memory, where matrices come and go.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
