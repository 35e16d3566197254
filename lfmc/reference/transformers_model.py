"""transformers' model, run layer by layer in float32: the reference of rung 1.

transformers is imported only when parity is checked. The model is built without weights, and its
own code runs everything: `forward` is called once to find the inputs of each layer, then the layers
run one after another, each with its weights in memory, and a second call of `forward` turns the
last layer's output into logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.checkpoint.adapter import Adapter, read_adapter
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.tensor_names import (
    EMBEDDING,
    HEAD,
    decoder_name,
    decoder_parts,
    is_of_another_tower,
)
from lfmc.checkpoint.weight_files import read_tensor
from lfmc.errors import InputError
from lfmc.machine.quiet import quiet
from lfmc.model.read_config import VISION_TYPES
from lfmc.reference.module_outputs import Outputs, recording
from lfmc.run.conversation import Conversation, Reply

_LAYER = re.compile(r"(^|\.)layers\.\d+$")


def is_available() -> bool:
    """Return whether transformers is installed. It is a reference; no artifact requires it."""
    from importlib.util import find_spec

    return find_spec("transformers") is not None


@dataclass
class _Text:
    """A text on its way through the model.

    `hidden` is `[1, T, H]`. `arguments` are the other arguments of each layer's call, by name.
    """

    ids: Tensor
    hidden: Tensor
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


class LayerwiseTransformers:
    """The float32 model of transformers with the weights of one layer in memory at a time.

    It reads each conversation in one call, without a cache: calls and states are what it is
    compared with. If `module_outputs` is given, it receives the outputs of all modules by name.
    `progress` receives a count of the layers.
    """

    last_only = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        module_outputs: Outputs | None = None,
        progress: Callable[[str], None] = lambda detail: None,
    ) -> None:
        self._checkpoint, self._module_outputs = checkpoint, module_outputs
        self._progress = progress
        with quiet("transformers"), _readable(checkpoint):
            self._model = _build(checkpoint)
        if checkpoint.adapter is not None:
            _apply_adapter(self._model, read_adapter(checkpoint.adapter))
        layers = {n: m for n, m in self._model.named_modules() if _LAYER.search(n)}
        self._layers = {n: m for n, m in layers.items() if not is_of_another_tower(n)}

    def run(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Return the reply to each conversation."""
        sequences = [conversation.tokens for conversation in conversations]
        longest = _distinct(sequences)
        with torch.no_grad(), _readable(self._checkpoint):
            logits = self._logits(longest)
        return [Reply(_logits_of(tokens, longest, logits)) for tokens in sequences]

    def _logits(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits `[T, V]` of sequences of tokens, int64 `[T]`."""
        model = self._model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for name, module in model.named_modules():
            is_in_layer = any(name == n or name.startswith(f"{n}.") for n in self._layers)
            if module is not head and not is_in_layer and not is_of_another_tower(f"{name}."):
                self._load(name, module, recurse=False)
        with quiet():
            texts = [self._inputs_of_layers(ids) for ids in sequences]
        embedding.to("meta")
        for index, (name, layer) in enumerate(self._layers.items()):
            self._progress(f"layer {index + 1} of {len(self._layers)}")
            self._load(name, layer, recurse=True)
            with quiet(), recording(layer, name, self._module_outputs):
                for text in texts:
                    args, kwargs = text.arguments[name]
                    output = layer(text.hidden, *args, **kwargs)
                    text.hidden = output[0] if isinstance(output, tuple) else output
            layer.to("meta")
        tied = self._checkpoint.config.tied_embedding
        head.weight = nn.Parameter(self._read(EMBEDDING if tied else HEAD), requires_grad=False)
        with quiet():
            return [self._run_after_layers(text) for text in texts]

    def _inputs_of_layers(self, ids: Tensor) -> _Text:
        """Return what `forward` passes to each layer."""
        text = _Text(ids, torch.empty(0), {})

        def replacement(name: str) -> Callable[..., Tensor]:
            def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if not text.arguments:
                    text.hidden = hidden
                text.arguments[name] = args, kwargs
                return hidden

            return record

        vocab_size = self._checkpoint.config.vocab_size

        def skip_head(hidden: Tensor) -> Tensor:
            return hidden.new_zeros(()).expand(*hidden.shape[:-1], vocab_size)

        functions = {module: replacement(name) for name, module in self._layers.items()}
        with _replaced({**functions, self._model.get_output_embeddings(): skip_head}):
            self._model(ids.view(1, -1), use_cache=False)
        return text

    def _run_after_layers(self, text: _Text) -> Tensor:
        """Return the logits `[T, V]` of a text whose `hidden` is the last layer's output."""

        def skip(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return text.hidden

        modules = [self._model.get_input_embeddings(), *self._layers.values()]
        with _replaced(dict.fromkeys(modules, skip)):
            logits: Tensor = self._model(text.ids.view(1, -1), use_cache=False).logits
        return logits[0].float()

    def _load(self, path: str, module: nn.Module, *, recurse: bool) -> None:
        """Set the parameters and the persistent buffers of a module, and of those in it."""
        values = {
            name: self._read(f"{path}.{name}" if path else name, tensor.shape)
            for name, tensor in module.state_dict().items()
            if recurse or "." not in name
        }
        module.load_state_dict(values, strict=False, assign=True)
        module.requires_grad_(False)

    def _read(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Return a tensor of the model by transformers' name, float32, as it is stored."""
        parts = list(decoder_parts(name, shape))
        if len(parts) == 1:
            return self._read_stored(parts[0][0])
        packed = torch.empty(tuple(shape))
        for stored_name, part in parts:
            assert part is not None
            packed[part.expert, part.start : part.stop] = self._read_stored(stored_name)
        return packed

    def _read_stored(self, name: str) -> Tensor:
        """Return a tensor without the adapter and the gain, which transformers adds itself."""
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise InputError(
                "the reference has a tensor that the checkpoint does not have",
                where=self._checkpoint.path,
                got=name,
                todo="save the checkpoint again with transformers' save_pretrained",
            )
        return read_tensor(replace(info, gain=1.0, adapter=None)).float()


def _begins(longer: Tensor, shorter: Tensor) -> bool:
    return torch.equal(longer[: len(shorter)], shorter)


def _logits_of(tokens: Tensor, sequences: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """Return the logits of the sequence that begins with `tokens`, of these tokens only."""
    pairs = zip(sequences, logits, strict=True)
    return next(rows[: len(tokens)] for ids, rows in pairs if _begins(ids, tokens))


def _distinct(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Return the sequences without those that another one begins with."""
    distinct: list[Tensor] = []
    for ids in sorted(sequences, key=len, reverse=True):
        if not any(_begins(longer, ids) for longer in distinct):
            distinct.append(ids)
    return distinct


@contextmanager
def _replaced(functions: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace `forward` of modules while the context is open."""
    for module, function in functions.items():
        module.forward = function
    try:
        yield
    finally:
        for module in functions:
            del module.forward


def require_reference(checkpoint: Checkpoint) -> None:
    """Raise `InputError` if transformers can't build the model; load no weights."""
    with quiet("transformers"), _readable(checkpoint):
        _build(checkpoint)


def _build(checkpoint: Checkpoint) -> Any:
    """Return the model with parameters on the meta device, and its rotary tables in memory."""
    with torch.device("meta"):
        model = _loader(checkpoint).from_config(_model_config(checkpoint), dtype=torch.float32)
    for path, module in list(model.named_modules()):
        if module._non_persistent_buffers_set and not is_of_another_tower(f"{path}."):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, type(module)(module.config))
    return model.eval()


def _model_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration of a checkpoint whose weights are floats."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(checkpoint.path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
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
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            "transformers can't run this model, so there is no reference to compare with",
            where=checkpoint.path,
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            todo="repair config.json or the weights (or --check off: the result is not verified)",
        ) from error


def _apply_adapter(model: Any, adapter: Adapter) -> None:
    """Add the products of an adapter to the outputs of its modules, without merging weights."""
    modules = {decoder_name(f"{name}.weight"): module for name, module in model.named_modules()}
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
