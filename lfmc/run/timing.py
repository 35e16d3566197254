"""Measures the tokens per second of a stepper, in prefill and decode."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from lfmc.errors import GateError
from lfmc.run.stepper import Stepper

PROMPT, TOKENS, ROUNDS = 128, 64, 5  # defaults of `lfmc bench`


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the fastest round and the median one."""

    best: float
    median: float


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


def time_stepper(stepper: Stepper, prompt: int, tokens: int, rounds: int) -> dict[str, Rate]:
    """Return the rates of prefill and decode over `rounds`, after one warm-up round."""
    time_round(stepper, prompt, min(tokens, 4))
    times = [time_round(stepper, prompt, tokens) for _ in range(rounds)]
    return {
        name: Rate(count / min(seconds), count / statistics.median(seconds))
        for name, count, seconds in (
            ("prefill", prompt, [prefill for prefill, _ in times]),
            ("decode", tokens, [decode for _, decode in times]),
        )
    }
