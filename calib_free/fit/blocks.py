"""Run a model one block at a time, with one block and the hidden states in memory."""

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
BATCH = 16  # texts that a block runs on at a time


class Block(nn.Module):
    """One layer of a checkpoint in float32 on a device, for whole texts from position 0."""

    def __init__(self, checkpoint: Checkpoint, index: int, device: torch.device | str) -> None:
        super().__init__()
        self.config, self.index = checkpoint.config, index
        self.prefix = f"model.layers.{index}."
        self.names = [name for name in checkpoint.tensors if name.startswith(self.prefix)]
        with torch.device("meta"):
            self.layer = Layer(checkpoint.config, index, "index_copy")
        weights = {name: checkpoint.load(name).float().to(device) for name in self.names}
        self.layer.load_state_dict(self._local_names(weights), assign=True)
        for module in self.layer.modules():
            if isinstance(module, SparseMoe):
                module.only_chosen = True
        self.requires_grad_(False)

    def _local_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights by their names within the layer."""
        return {name.removeprefix(self.prefix): value for name, value in weights.items()}

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the layer's output `[B, T, H]`; `weights`, by name, replace its weights."""
        batch, length, _ = hidden.shape
        device = hidden.device
        attention = attention_inputs(
            self.config,
            torch.arange(length, device=device),
            length,
            lambda kind: inverse_frequencies(self.config, kind).to(device),
        )
        layer_attention = attention.get(self.config.layer_types[self.index], ())
        states = initial_state(self.config, batch, length, device, self.index)
        overrides = {} if weights is None else self._local_names(weights)
        output: Tensor = functional_call(self.layer, overrides, (hidden, layer_attention, states))[
            0
        ]
        return output


def embed(texts: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the input of the first block, float32 `[N, T, H]`, for `texts` `[N, T]`."""
    return F.embedding(texts, weights[EMBEDDING].float().to(texts.device))


def head_logits(config: DecoderConfig, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return logits `[..., V]` for the output of the last block, `[..., H]`."""
    norm = RmsNorm(hidden.shape[-1], config.norm_eps)
    norm.weight = nn.Parameter(weights[NORM].float().to(hidden.device), requires_grad=False)
    name = EMBEDDING if config.tied_embedding else HEAD
    return F.linear(norm(hidden), weights[name].float().to(hidden.device))


@torch.no_grad()
def run_block(block: Block, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Run a block on all hidden states `[N, T, H]`, a few texts at a time."""
    return torch.cat([block(part, weights) for part in hidden.split(BATCH)])


@torch.no_grad()
def planned_kl(checkpoint: Checkpoint, plan: BitPlan, texts: Tensor) -> float:
    """Compute the mean KL(checkpoint || plan) over the tokens of `texts` `[N, T]` in nats."""
    weights, planned = checkpoint.weights, dequantized_weights(checkpoint, plan)
    reference, hidden = embed(texts, weights), embed(texts, planned)
    for index in range(checkpoint.config.num_layers):
        block = Block(checkpoint, index, texts.device)
        reference = run_block(block, reference)
        block_weights = {name: planned[name].to(texts.device) for name in block.names}
        hidden = run_block(block, hidden, block_weights)
    config, kls = checkpoint.config, []
    for part, part_hidden in zip(reference.split(BATCH), hidden.split(BATCH), strict=True):
        expected = head_logits(config, part, weights)
        kls.append(float(kl(expected, head_logits(config, part_hidden, planned))) * len(part))
    return sum(kls) / len(texts)
