"""The host's part of an inference: states, tables, and calls of fixed lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lfmc.run.stepper import require_tokens
from lfmc.targets.npu.interface import Interface, update_state

Execute = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]
Embed = Callable[[Tensor], Tensor]


class HostStepper:
    """One conversation.

    There are graphs for calls of `lengths` tokens. `execute` runs the graph of a length. `embed`
    returns the float32 embeddings `[T, H]` of tokens int64 `[T]`.
    """

    def __init__(
        self, interface: Interface, lengths: Sequence[int], execute: Execute, embed: Embed
    ) -> None:
        self.context = interface.context
        self._interfaces = {count: interface.with_tokens(count) for count in sorted(lengths)}
        self._vocab_size, self._specs = interface.vocab_size, interface.states
        self._shapes = [interface.state_shape(s, self.context) for s in interface.states]
        self._execute, self._embed = execute, embed
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._length = 0
        self._states = list(map(torch.zeros, self._shapes))

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Feed tokens and return their float32 logits `[T, V]`."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        require_tokens(ids, self._length, self.context, self._vocab_size)
        longest = max(self._interfaces)
        return torch.cat([self._call(piece) for piece in ids.split(longest)])

    def _call(self, ids: Tensor) -> Tensor:
        """Call the shortest graph that takes the tokens, with padding."""
        length = next(n for n in self._interfaces if n >= len(ids))
        count = len(ids)
        outputs = self._execute(length, self.inputs(ids, length))
        self._states = [
            update_state(spec, state, outputs[f"{spec.identifier}_new"], self._length, count)
            for spec, state in zip(self._specs, self._states, strict=True)
        ]
        self._length += count
        return outputs["logits"][0, :count]

    def inputs(self, ids: Tensor, length: int) -> dict[str, Tensor]:
        """Return the inputs of the graph of a length for the next tokens, with padding."""
        interface = self._interfaces[length]
        hidden = torch.zeros(interface.inputs["hidden"])
        hidden[0, : len(ids)] = self._embed(ids)
        names = (spec.identifier for spec in self._specs)
        states = dict(zip(names, self._states, strict=True))
        return {"hidden": hidden, **interface.tables(self._length), **states}
