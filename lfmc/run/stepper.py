"""`Stepper`, the interface of every model that runs token by token, and its torch version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lfmc.errors import InputError
from lfmc.model import Decoder, DecoderConfig, initial_state


class Stepper(Protocol):
    """A model that carries its state from call to call, as in an app."""

    context: int

    def reset(self) -> None:
        """Clear the state."""

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return float32 logits `[T, V]` for the next `T` tokens, from 1 up to the free context.

        Returns `[1, V]` if the artifact was exported to return only the logits of the last token.
        """


@runtime_checkable
class LastOnly(Protocol):
    """A stepper with a flag: whether it returns logits of a call's last token only."""

    last_only: bool


def returns_last_only(stepper: Stepper) -> bool:
    return isinstance(stepper, LastOnly) and stepper.last_only


def step_all_logits(stepper: Stepper, tokens: Tensor) -> Tensor:
    """Return logits `[T, V]` of all `tokens` `[T]`.

    If the stepper returns logits of a call's last token only, each token is a separate call.
    """
    pieces = tokens.split(1 if returns_last_only(stepper) else max(1, len(tokens)))
    return torch.cat([stepper.step(piece) for piece in pieces])


def require_tokens(ids: Tensor, length: int, context: int, vocab_size: int) -> None:
    """Raise `InputError` if `ids` `[..., T]` can't follow `length` earlier tokens."""
    if not ids.shape[-1]:
        raise InputError("a step needs at least one token")
    total = length + ids.shape[-1]
    if total > context:
        raise InputError(
            "the conversation is longer than the exported context",
            expected=f"at most {context} tokens",
            got=f"{total}",
            todo="reset, or export with a larger --context",
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise InputError(
            "a token id is outside of the vocabulary", expected=f"0 to {vocab_size - 1}"
        )


class TorchStepper:
    """A `Stepper` over `function(tokens, positions, *states) -> (logits, *states)`.

    Runs `batch` rows of equal length.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Any]],
        config: DecoderConfig,
        context: int,
        batch: int = 1,
    ) -> None:
        self.context = context
        self._function, self._config, self._batch = function, config, batch
        self.reset()

    def reset(self) -> None:
        """Clear the states."""
        self._length = 0
        self._states: Sequence[Tensor] = initial_state(self._config, self._batch, self.context)

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return float32 logits `[T, V]` (`[B, T, V]` for a batch) of the next tokens."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(self._batch, -1)
        end = self._length + ids.shape[1]
        if end > self.context:
            raise InputError(
                "more tokens than cache slots", expected=f"at most {self.context}", got=end
            )
        positions = torch.arange(self._length, end)
        with torch.no_grad():
            logits, *self._states = self._function(ids, positions, *self._states)
        self._length = end
        return logits[0] if self._batch == 1 else logits  # type: ignore[no-any-return]


def decoder_stepper(decoder: Decoder, context: int, batch: int = 1) -> TorchStepper:
    """Return a stepper over the decoder."""

    def forward(tokens: Tensor, positions: Tensor, *states: Tensor) -> list[Tensor]:
        logits, new_states = decoder(tokens, positions, states)
        return [logits, *new_states]

    return TorchStepper(forward, decoder.config, context, batch)
