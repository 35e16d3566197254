"""The model a block at a time: memory is that of one block, and of hidden states between blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lfmc.calib_free.fit.distill import kl
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.planned_tensors import dequantized_weights
from lfmc.calib_free.plan.roles import EMBEDDING, HEAD
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.model import DecoderConfig, initial_state
from lfmc.model.decoder import Layer, attention_inputs
from lfmc.model.experts import SparseMoe
from lfmc.model.norm import RmsNorm
from lfmc.model.rope import inverse_frequencies

NORM = "model.embedding_norm.weight"
BATCH = 16  # texts pushed through a block at a time


class Block(nn.Module):
    """One layer of a checkpoint, float32 on a device, for whole texts from their start."""

    def __init__(self, checkpoint: Checkpoint, index: int, device: torch.device | str) -> None:
        super().__init__()
        self.config, self.index = checkpoint.config, index
        self.prefix = f"model.layers.{index}."
        self.names = [name for name in checkpoint.tensors if name.startswith(self.prefix)]
        with torch.device("meta"):
            self.layer = Layer(checkpoint.config, index, "index_copy")
        weights = {name: checkpoint.load(name).float().to(device) for name in self.names}
        self.layer.load_state_dict(self._own(weights), assign=True)
        for module in self.layer.modules():
            if isinstance(module, SparseMoe):
                module.only_chosen = True
        self.requires_grad_(False)

    def _own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(self.prefix): value for name, value in weights.items()}

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden states `[B, T, H]` behind the layer; `weights`, by name, replace its own."""
        batch, length, _ = hidden.shape
        device = hidden.device
        attention = attention_inputs(
            self.config,
            torch.arange(length, device=device),
            length,
            lambda kind: inverse_frequencies(self.config, kind).to(device),
        )
        own = attention.get(self.config.layer_types[self.index], ())
        states = initial_state(self.config, batch, length, device, self.index)
        replaced = {} if weights is None else self._own(weights)
        result: Tensor = functional_call(self.layer, replaced, (hidden, own, states))[0]
        return result


def embed(texts: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """What goes into the first block, float32 `[N, T, H]`, for `texts` `[N, T]`."""
    return F.embedding(texts, weights[EMBEDDING].float().to(texts.device))


def head(config: DecoderConfig, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Logits `[..., V]` of what comes out of the last block, `[..., H]`."""
    norm = RmsNorm(hidden.shape[-1], config.norm_eps)
    norm.weight = nn.Parameter(weights[NORM].float().to(hidden.device), requires_grad=False)
    name = EMBEDDING if config.tied_embedding else HEAD
    return F.linear(norm(hidden), weights[name].float().to(hidden.device))


@torch.no_grad()
def push(block: Block, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """All hidden states `[N, T, H]` through a block, a few texts at a time."""
    return torch.cat([block(part, weights) for part in hidden.split(BATCH)])


@torch.no_grad()
def planned_kl(checkpoint: Checkpoint, plan: BitPlan, texts: Tensor) -> float:
    """Mean KL(checkpoint || plan) over the tokens of `texts` `[N, T]`, in nats, block by block."""
    stored, planned = checkpoint.weights, dequantized_weights(checkpoint, plan)
    wanted, given = embed(texts, stored), embed(texts, planned)
    for index in range(checkpoint.config.num_layers):
        block = Block(checkpoint, index, texts.device)
        wanted = push(block, wanted)
        own = {name: planned[name].to(texts.device) for name in block.names}
        given = push(block, given, own)
    pairs = zip(wanted.split(BATCH), given.split(BATCH), strict=True)
    config = checkpoint.config
    found = [
        float(kl(head(config, w, stored), head(config, g, planned))) * len(w) for w, g in pairs
    ]
    return sum(found) / len(texts)
