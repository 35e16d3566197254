"""Measures the tokens per second of a stepper, in prefill and decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.errors import GateError
from lfmc.run.stepper import Stepper

PROMPT, TOKENS, ROUNDS = 128, 64, 5  # defaults of `lfmc bench`


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the fastest round and the median one."""

    best: float
    median: float


class TimedStepper:
    """A stepper that measures its calls: the first is the prefill, the others decode."""

    def __init__(self, stepper: Stepper, clock: Callable[[], float] = time.perf_counter) -> None:
        self.context = stepper.context
        self._stepper, self._clock = stepper, clock
        self._calls: list[tuple[int, float]] = []

    def reset(self) -> None:
        """Clear the state, and forget the calls."""
        self._stepper.reset()
        self._calls = []

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return the logits of the stepper."""
        started = self._clock()
        logits = self._stepper.step(tokens)
        self._calls.append((len(tokens), self._clock() - started))
        return logits

    @property
    def prefill(self) -> float | None:
        """Tokens per second of the first call; None before it."""
        return _rate(self._calls[:1])

    @property
    def decode(self) -> float | None:
        """Tokens per second of all other calls; None if there are none."""
        return _rate(self._calls[1:])


def _rate(calls: Sequence[tuple[int, float]]) -> float | None:
    seconds = sum(call_seconds for _, call_seconds in calls)
    return sum(count for count, _ in calls) / seconds if seconds > 0 else None


def default_lengths(context: int) -> tuple[int, int]:
    """Return the default numbers of prefill and decode tokens, limited to half a context each."""
    prompt = min(PROMPT, context // 2)
    return prompt, min(TOKENS, context - prompt)


def require_speed(stepper: Stepper, min_speed: float) -> Rate:
    """Return the decode rate; raise `GateError` if it is below `min_speed` tokens per second."""
    rate = time_stepper(stepper, *default_lengths(stepper.context), ROUNDS)["decode"]
    if rate.best < min_speed:
        raise GateError(
            "decoding is slower than required",
            expected=f"at least {min_speed:g} tokens a second (--min-speed)",
            got=f"{rate.best:.1f}, the best of {ROUNDS} rounds on this machine",
        )
    return rate


def time_round(stepper: Stepper, prompt: int, tokens: int) -> tuple[float, float]:
    """Return the seconds of a prefill of `prompt` tokens, and of `tokens` decode steps after it."""
    ids = torch.randint(1, 100, (prompt,), generator=torch.Generator().manual_seed(0))
    stepper.reset()
    start = time.perf_counter()
    logits = stepper.step(ids)
    prefill_end = time.perf_counter()
    for _ in range(tokens):
        logits = stepper.step(logits[-1:].argmax(-1))
    return prefill_end - start, time.perf_counter() - prefill_end


def time_stepper(
    stepper: Stepper,
    prompt: int,
    tokens: int,
    rounds: int,
    progress: Callable[[str], None] = lambda detail: None,
) -> dict[str, Rate]:
    """Return the rates of prefill and decode over `rounds`, after one warm-up round."""
    progress("warm-up")
    time_round(stepper, prompt, min(tokens, 4))
    times = []
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}")
        times.append(time_round(stepper, prompt, tokens))
    return {
        name: Rate(count / min(seconds), count / statistics.median(seconds))
        for name, count, seconds in (
            ("prefill", prompt, [prefill for prefill, _ in times]),
            ("decode", tokens, [decode for _, decode in times]),
        )
    }
