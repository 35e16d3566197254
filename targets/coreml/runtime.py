"""Running a package the way an app does: chunks of a prompt, then one token at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lfmc.parity.expert_choices import Choice, joined
from lfmc.run.stepper import require_tokens
from lfmc.targets.coreml.names import DECODE, FACTS_KEY, PREFILL, output_name


class Engine(Protocol):
    """What executes the functions of a package: the interpreter, or Core ML itself."""

    metadata: Mapping[str, str]

    def new_state(self) -> Any:
        """States that the system keeps, all zeros."""

    def new_passed(self) -> dict[str, Tensor]:
        """States that are inputs and outputs, all zeros."""
        ...

    def call(
        self, name: str, given: Mapping[str, Tensor], state: Any, watch: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Outputs by name, and variables in `watch` if it can look at them; `state` is updated."""
        ...


class CoremlStepper:
    """One conversation.

    `prefill` takes a chunk of tokens, of which the first `valid` count; `decode` takes one. Where a
    whole chunk no longer fits the context, tokens go one by one. `choice` is which experts the last
    step's tokens chose, where the engine shows what is inside of a function.
    """

    choice: Choice | None = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        facts: dict[str, Any] = json.loads(engine.metadata[FACTS_KEY])
        self.context, self._chunk = facts["context"], facts["chunk"]
        self._vocab, self._chosen = facts["vocab_size"], facts["chosen"]
        self.reset()

    def reset(self) -> None:
        """Forget the conversation: states are zeros again."""
        self._length = 0
        self._state = self._engine.new_state()
        self._passed = self._engine.new_passed()

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Float32 logits `[T, V]` of the tokens that come next."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        require_tokens(ids, self._length, self.context, self._vocab)
        logits, choices = [], []
        while len(ids):
            fits = self._length + self._chunk <= self.context
            count = min(len(ids), self._chunk) if fits and len(ids) > 1 else 1
            found = self._call(ids[:count])
            logits.append(found["logits"][0, :count].float())
            layers = [found[name][:count] for name in self._chosen if name in found]
            if layers:
                choices.append(Choice(torch.stack(layers).long().sort(-1).values))
            ids = ids[count:]
            self._length += count
        self.choice = joined(choices) if choices else None
        return torch.cat(logits)

    def _call(self, ids: Tensor) -> dict[str, Tensor]:
        given: dict[str, Any] = {"position": torch.tensor([self._length], dtype=torch.int32)}
        name, count = DECODE, len(ids)
        if count > 1:
            name = PREFILL
            given["valid"] = torch.tensor([count], dtype=torch.int32)
            ids = torch.nn.functional.pad(ids, (0, self._chunk - count))
        given["input_ids"] = ids.to(torch.int32).unsqueeze(0)
        found = self._engine.call(name, {**given, **self._passed}, self._state, self._chosen)
        self._passed = {key: found[output_name(key)] for key in self._passed}
        return found
