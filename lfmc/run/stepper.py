"""The calls that an app makes of a model, and a decoder or a program in torch behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lfmc.errors import InputError
from lfmc.model import Decoder, DecoderConfig, initial_state


class Stepper(Protocol):
    """Whatever runs a model the way an app does: state is carried from call to call."""

    context: int

    def reset(self) -> None:
        """Forget the conversation."""

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Float32 logits `[T, V]` for `T` more tokens, any `T` from 1 up to what is left; of an
        artifact that was exported so, `[1, V]`, of the last of them."""


@runtime_checkable
class LastOnly(Protocol):
    """A stepper that tells whether it gives logits of a call's last token only."""

    last_only: bool


def gives_last_only(stepper: Stepper) -> bool:
    return isinstance(stepper, LastOnly) and stepper.last_only


def step_each(stepper: Stepper, tokens: Tensor) -> Tensor:
    """Logits `[T, V]` of every one of `tokens` `[T]`: in one call, or one by one where only the
    last of a call has any."""
    pieces = tokens.split(1 if gives_last_only(stepper) else max(1, len(tokens)))
    return torch.cat([stepper.step(piece) for piece in pieces])


def require_tokens(ids: Tensor, length: int, context: int, vocab_size: int) -> None:
    """Raise `InputError` where an artifact can't take `ids` `[..., T]` behind `length` others."""
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
    """Carries the states of `function(tokens, positions, *states) -> (logits, *states)`.

    A `Stepper` for `batch` rows of equal length.
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
        """Forget the conversation."""
        self._length = 0
        self._states: Sequence[Tensor] = initial_state(self._config, self._batch, self.context)

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Float32 logits `[T, V]` (`[B, T, V]` for a batch) of the tokens that come next."""
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
    """A stepper over the plain decoder."""

    def forward(tokens: Tensor, positions: Tensor, *states: Tensor) -> list[Tensor]:
        logits, new = decoder(tokens, positions, states)
        return [logits, *new]

    return TorchStepper(forward, decoder.config, context, batch)
