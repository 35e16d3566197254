"""The model a block at a time: memory is that of one block, and of hidden states between blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lfmc.checkpoint import Checkpoint
from lfmc.model import initial_state
from lfmc.model.decoder import Layer, attention_inputs
from lfmc.model.experts import SparseMoe
from lfmc.model.rope import inverse_frequencies


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
