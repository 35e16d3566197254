"""Conversations whose tokens are known in advance, and the models that run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from lfmc.run.expert_choice import ExpertChoice, RecordsExpertChoice, concat_choices
from lfmc.run.stepper import Stepper, returns_last_only


@dataclass(frozen=True)
class Conversation:
    """The tokens of consecutive calls, int64 `[T]` each, from the start of a conversation.

    If `earlier` is not None, a model with states first runs this prompt and is then reset.
    """

    calls: tuple[Tensor, ...]
    earlier: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """The tokens of all calls, int64 `[T]`."""
        return torch.cat(self.calls)

    @property
    def ends(self) -> list[int]:
        """The number of tokens up to the end of each call."""
        return list(accumulate(map(len, self.calls)))


@dataclass(frozen=True)
class Reply:
    """Float32 logits `[T, V]` of a conversation, and the experts that its tokens chose.

    `choice` is None if the model has no experts or does not record them.
    """

    logits: Tensor
    choice: ExpertChoice | None = None


class ConversationModel(Protocol):
    """A model that replies to conversations.

    With `last_only`, a reply contains logits of the last token of each call only.
    """

    last_only: bool

    def run(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Return the reply to each conversation."""


class SteppedModel:
    """Runs conversations one after another on a stepper, in the calls of an app."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self.last_only = returns_last_only(stepper)

    def run(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Return the reply to each conversation."""
        return [self._run(conversation) for conversation in conversations]

    def _run(self, conversation: Conversation) -> Reply:
        stepper = self._stepper
        stepper.reset()
        if conversation.earlier is not None:
            stepper.step(conversation.earlier)
            stepper.reset()
        logits, choices = [], []
        for tokens in conversation.calls:
            call_logits = stepper.step(tokens)
            logits.append(call_logits[-1:] if self.last_only else call_logits)
            if isinstance(stepper, RecordsExpertChoice) and stepper.choice is not None:
                choices.append(stepper.choice)
        return Reply(torch.cat(logits), concat_choices(choices) if choices else None)


class ReplayStepper:
    """A stepper over a model that keeps no state: each step runs the whole conversation again."""

    def __init__(self, model: ConversationModel, context: int) -> None:
        self.context = context
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self._calls: tuple[Tensor, ...] = ()

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return float32 logits `[T, V]` of the next tokens."""
        self._calls += (torch.as_tensor(tokens, dtype=torch.int64),)
        (reply,) = self._model.run([Conversation(self._calls)])
        return reply.logits[-len(tokens) :]
