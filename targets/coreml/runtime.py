"""Run a package as an app does: chunks of a prompt, then one token at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lfmc.run.expert_choice import ExpertChoice, concat_choices
from lfmc.run.stepper import require_tokens
from lfmc.targets.coreml.names import DECODE, FACTS_KEY, PREFILL, output_name


class Engine(Protocol):
    """The executor of a package's functions: the interpreter, or Core ML itself."""

    metadata: Mapping[str, str]

    def new_state(self) -> Any:
        """Return the states in MLState, all zeros."""

    def new_io_states(self) -> dict[str, Tensor]:
        """Return the states that are passed as inputs and outputs, all zeros."""
        ...

    def call(
        self, name: str, inputs: Mapping[str, Tensor], state: Any, watch: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Run a function, update `state`, and return its outputs by name.

        The result includes the variables in `watch` if the engine can read them.
        """
        ...


class CoremlStepper:
    """One conversation.

    `prefill` takes a chunk of tokens, of which the first `valid` are not padding. `decode` takes
    one token. If a whole chunk no longer fits the context, tokens are decoded one by one. `choice`
    lists the experts chosen for the last step's tokens, if the engine can read inner variables.
    """

    choice: ExpertChoice | None = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        facts: dict[str, Any] = json.loads(engine.metadata[FACTS_KEY])
        self.context, self._chunk = facts["context"], facts["chunk"]
        self._vocab_size, self._choice_names = facts["vocab_size"], facts["chosen"]
        self.reset()

    def reset(self) -> None:
        """Start a new conversation: set all states to zeros."""
        self._length = 0
        self._state = self._engine.new_state()
        self._io_states = self._engine.new_io_states()

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append tokens, and return their float32 logits `[T, V]`."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        require_tokens(ids, self._length, self.context, self._vocab_size)
        logits, choices = [], []
        while len(ids):
            fits = self._length + self._chunk <= self.context
            count = min(len(ids), self._chunk) if fits and len(ids) > 1 else 1
            outputs = self._call(ids[:count])
            logits.append(outputs["logits"][0, :count].float())
            layers = [outputs[name][:count] for name in self._choice_names if name in outputs]
            if layers:
                choices.append(ExpertChoice(torch.stack(layers).long().sort(-1).values))
            ids = ids[count:]
            self._length += count
        self.choice = concat_choices(choices) if choices else None
        return torch.cat(logits)

    def _call(self, ids: Tensor) -> dict[str, Tensor]:
        inputs: dict[str, Any] = {"position": torch.tensor([self._length], dtype=torch.int32)}
        name, count = DECODE, len(ids)
        if count > 1:
            name = PREFILL
            inputs["valid"] = torch.tensor([count], dtype=torch.int32)
            ids = torch.nn.functional.pad(ids, (0, self._chunk - count))
        inputs["input_ids"] = ids.to(torch.int32).unsqueeze(0)
        outputs = self._engine.call(
            name, {**inputs, **self._io_states}, self._state, self._choice_names
        )
        self._io_states = {key: outputs[output_name(key)] for key in self._io_states}
        return outputs
