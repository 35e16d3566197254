"""The list of states, which the decoder, every target and the manifest share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lfmc.model.config import CONV, DecoderConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

StateKind = Literal["conv", "key", "value"]


@dataclass(frozen=True)
class StateSpec:
    """One state: float32, all zeros at the start of a conversation.

    `conv` is `[B, H, kernel - 1]`, the last inputs of the filter, oldest first. `key` and `value`
    are `[B, K, C, D]`, with one slot per position. `window` is the size of the layer's sliding
    window, in positions; None if the layer attends to all positions.
    """

    name: str
    kind: StateKind
    layer: int
    shape: tuple[int, ...]
    window: int | None = None

    @property
    def identifier(self) -> str:
        """The name with underscores instead of dots."""
        return self.name.replace(".", "_")


def state_specs(config: DecoderConfig, batch: int, context: int) -> tuple[StateSpec, ...]:
    """Return the states in the order in which the decoder takes and returns them."""
    specs: list[StateSpec] = []
    for layer, kind in enumerate(config.layer_types):
        if kind == CONV:
            shape: tuple[int, ...] = (batch, config.hidden_size, config.conv_kernel - 1)
            specs.append(StateSpec(f"conv.{layer}", "conv", layer, shape))
        else:
            shape = (batch, config.num_kv_heads, context, config.head_dim)
            window = config.window(layer)
            specs.append(StateSpec(f"key.{layer}", "key", layer, shape, window))
            specs.append(StateSpec(f"value.{layer}", "value", layer, shape, window))
    return tuple(specs)


def initial_state(
    config: DecoderConfig,
    batch: int,
    context: int,
    device: torch.device | str = "cpu",
    layer: int | None = None,
) -> tuple[Tensor, ...]:
    """Return the initial states, float32 zeros, of all layers or of one `layer`."""
    import torch

    specs = state_specs(config, batch, context)
    return tuple(
        torch.zeros(spec.shape, device=device) for spec in specs if layer in (None, spec.layer)
    )
