"""Timing a stepper: tokens per second of prefill and decode."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from lfmc.errors import GateError
from lfmc.run.stepper import Stepper

PROMPT, TOKENS, ROUNDS = 128, 64, 5  # what is timed where nobody says otherwise


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the fastest round and the median one."""

    best: float
    median: float


def fitting(context: int) -> tuple[int, int]:
    """Tokens of prefill and of decode to time in a context: the usual ones, or half of it each."""
    prompt = min(PROMPT, context // 2)
    return prompt, min(TOKENS, context - prompt)


def require_speed(stepper: Stepper, slowest: float) -> Rate:
    """The rate of decode, the best of several rounds; `GateError` where it is below `slowest`."""
    rate = time_stepper(stepper, *fitting(stepper.context), ROUNDS)["decode"]
    if rate.best < slowest:
        raise GateError(
            "decoding is slower than asked for",
            expected=f"at least {slowest:g} tokens a second (--min-speed)",
            got=f"{rate.best:.1f}, the best of {ROUNDS} rounds on this machine",
        )
    return rate


def time_round(stepper: Stepper, prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds of one prefill of `prompt` tokens, and of `tokens` single steps after it."""
    ids = torch.randint(1, 100, (prompt,), generator=torch.Generator().manual_seed(0))
    stepper.reset()
    started = time.perf_counter()
    logits = stepper.step(ids)
    prefilled = time.perf_counter()
    for _ in range(tokens):
        logits = stepper.step(logits[-1:].argmax(-1))
    return prefilled - started, time.perf_counter() - prefilled


def time_stepper(stepper: Stepper, prompt: int, tokens: int, rounds: int) -> dict[str, Rate]:
    """Rates of prefill and decode over `rounds`, after one that warms up and is not counted."""
    time_round(stepper, prompt, min(tokens, 4))
    times = [time_round(stepper, prompt, tokens) for _ in range(rounds)]
    return {
        name: Rate(count / min(seconds), count / statistics.median(seconds))
        for name, count, seconds in (
            ("prefill", prompt, [first for first, _ in times]),
            ("decode", tokens, [second for _, second in times]),
        )
    }
