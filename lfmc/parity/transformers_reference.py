"""transformers, the reference of rung 1; imported only when parity is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.machine.quiet import quiet
from lfmc.model.read_config import VISION_TYPES


def is_available() -> bool:
    """Return whether transformers is installed. It is a reference; no artifact requires it."""
    from importlib.util import find_spec

    return find_spec("transformers") is not None


class TransformersStepper:
    """Runs the float32 model of transformers, with the cache of transformers, as a `Stepper`.

    `experts` maps every sparse layer to the experts `[T, k]` of the last step's tokens.
    """

    def __init__(self, checkpoint: Checkpoint, batch: int = 1) -> None:
        self.context = checkpoint.config.max_context
        self._batch = batch
        with quiet("transformers"):
            self.model = _load(checkpoint)
        self.experts: dict[int, Tensor] = {}
        for name, module in self.model.named_modules():
            if name.endswith("feed_forward.gate"):
                module.register_forward_hook(self._recorder(int(name.split(".")[-3])))
        self.reset()

    def _recorder(self, layer: int) -> Any:
        def record(_module: object, _inputs: object, output: tuple[Tensor, ...]) -> None:
            self.experts[layer] = output[2]

        return record

    def reset(self) -> None:
        """Clear the cache."""
        self._cache: Any = None

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return float32 logits `[T, V]` (`[B, T, V]` for a batch)."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(self._batch, -1)
        with torch.no_grad(), quiet():
            output = self.model(ids, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        logits: Tensor = output.logits
        return logits[0] if self._batch == 1 else logits


def _load(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    vision = checkpoint.raw_config.get("model_type") in VISION_TYPES
    loader = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return loader.from_pretrained(str(checkpoint.path), dtype=torch.float32).eval()
