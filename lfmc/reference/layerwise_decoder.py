"""Runs the decoder on many conversations with the weights of one layer in memory, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.checkpoint.tensor_names import EMBEDDING, HEAD
from lfmc.model import DecoderConfig, build_decoder, initial_state
from lfmc.model.decoder import attention_inputs
from lfmc.model.experts import SparseMoe
from lfmc.reference.module_outputs import Outputs, recording
from lfmc.run.conversation import Conversation, Reply

# Called with "embedding" or "layer 3", and the residual stream `[T, H]` of each conversation.
Observe = Callable[[str, list[Tensor]], None]


class LayerwiseDecoder:
    """The decoder with `weights`, which are read by name, one layer after another.

    `context` is the number of cache slots. `observe` receives the residual streams, and
    `module_outputs` the outputs of all modules by name. `progress` receives a count of the layers.
    """

    last_only = False

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        context: int,
        *,
        observe: Observe = lambda part, streams: None,
        module_outputs: Outputs | None = None,
        progress: Callable[[str], None] = lambda detail: None,
    ) -> None:
        self._config, self._weights, self._context = config, weights, context
        self._observe, self._progress = observe, progress
        self._module_outputs = module_outputs
        self._decoder = build_decoder(config)
        for module in self._decoder.modules():
            if isinstance(module, SparseMoe):
                module.only_chosen = True

    def run(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Return the reply to each conversation."""
        hidden = self.hidden(conversations)
        head = self.head()
        return [Reply(F.linear(rows, head)) for rows in hidden]

    def head(self) -> Tensor:
        """Return the matrix of the head, float32 `[V, H]`."""
        return self._weights[EMBEDDING if self._config.tied_embedding else HEAD].float()

    def hidden(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Return the inputs of the head, float32 `[T, H]`, of each conversation."""
        with torch.no_grad():
            table = self._weights[EMBEDDING]
            streams = [
                [table[ids].float() for ids in conversation.calls] for conversation in conversations
            ]
            del table
            self._observe("embedding", [torch.cat(calls) for calls in streams])
            for index in range(self._config.num_layers):
                self._progress(f"layer {index + 1} of {self._config.num_layers}")
                self._run_layer(index, streams)
                self._observe(f"layer {index}", [torch.cat(calls) for calls in streams])
            norm = self._loaded("model.embedding_norm")
            return [norm(torch.cat(calls)) for calls in streams]

    def _run_layer(self, index: int, streams: list[list[Tensor]]) -> None:
        """Replace the residual stream `[T, H]` of every call by the output of a layer."""
        config, kind = self._config, self._config.layer_types[index]
        name = f"model.layers.{index}"
        layer = self._loaded(name)
        frequencies = self._decoder.rope.get_buffer
        with recording(layer, name, self._module_outputs):
            for calls in streams:
                states: Sequence[Tensor] = initial_state(config, 1, self._context, layer=index)
                start = 0
                for number, x in enumerate(calls):
                    positions = torch.arange(start, start + len(x))
                    attention = attention_inputs(config, positions, self._context, frequencies)
                    y, states = layer(x.unsqueeze(0), attention.get(kind, ()), states)
                    calls[number] = y[0]
                    start += len(x)
        layer.to("meta")

    def _loaded(self, path: str) -> nn.Module:
        """Return a module of the decoder with its weights in memory."""
        module = self._decoder.get_submodule(path)
        names = module.state_dict().keys()
        weights = {name: self._weights[f"{path}.{name}"].float() for name in names}
        module.load_state_dict(weights, assign=True)
        return module.requires_grad_(False)
