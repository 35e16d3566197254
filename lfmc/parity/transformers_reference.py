"""transformers, the reference of rung 1; imported only when parity is checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.checkpoint.adapter import Adapter, read_adapter
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.tensor_names import EMBEDDING, HEAD, decoder_name
from lfmc.checkpoint.weight_files import read_tensor
from lfmc.errors import InputError
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


def require_reference(checkpoint: Checkpoint) -> None:
    """Raise `InputError` if transformers can't build the model; load no weights."""
    with quiet("transformers"), _readable(checkpoint), torch.device("meta"):
        _loader(checkpoint).from_config(_config(checkpoint))


def _load(checkpoint: Checkpoint) -> Any:
    """Return the float32 model of transformers, with the adapter of the checkpoint."""
    with _readable(checkpoint):
        model, report = _loader(checkpoint).from_pretrained(
            str(checkpoint.path),
            config=_config(checkpoint),
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            "transformers does not load all tensors of the checkpoint",
            where=checkpoint.path,
            expected="the reference with all weights",
            got=f"{len(missing)} tensors with random values: {', '.join(missing[:4])}",
            todo="save the checkpoint again with transformers' save_pretrained",
        )
    if checkpoint.adapter is not None:
        _apply_adapter(model, read_adapter(checkpoint.adapter))
    return model.eval()


def _config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(checkpoint.path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are floats
    return config


def _loader(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    vision = checkpoint.raw_config.get("model_type") in VISION_TYPES
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


@contextmanager
def _readable(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise `InputError` for any error of transformers, which raises many kinds."""
    try:
        yield
    except Exception as error:
        raise InputError(
            "transformers can't build this model, so there is no reference to compare with",
            where=checkpoint.path,
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            todo="repair config.json or the weights (or --check off: the result is not verified)",
        ) from error


def _apply_adapter(model: Any, adapter: Adapter) -> None:
    """Add the products of an adapter to the outputs of its modules, without merging weights."""
    modules = {decoder_name(f"{name}.weight"): module for name, module in model.named_modules()}
    for name, info in adapter.copies.items():
        modules[name].weight = torch.nn.Parameter(read_tensor(info).float())
    for name, low_rank in adapter.low_rank.items():
        names = {name}
        if adapter.ties_weights and name == EMBEDDING and HEAD not in adapter.low_rank:
            names = {EMBEDDING, HEAD}
        for adapted in names:
            modules[adapted].register_forward_hook(_add_product(low_rank.values()))


def _add_product(values: Tensor) -> Any:
    """Return a forward hook that adds the output of a linear layer or embedding with `values`."""

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        apply = F.embedding if isinstance(module, torch.nn.Embedding) else F.linear
        return output + apply(inputs[0], values)

    return hook
