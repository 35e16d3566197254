"""transformers, with its own cache, as a `Stepper`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class TransformersStepper:
    """Runs the float32 model of transformers."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.context = self._model.config.max_position_embeddings
        self.reset()

    def reset(self) -> None:
        """Clear the cache."""
        self._cache: Any = None

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return float32 logits `[T, V]`."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).view(1, -1)
        with torch.no_grad():
            output = self._model(ids, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[0]
        return logits
