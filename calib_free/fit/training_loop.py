"""The loop that students learn in: rates, batches, time, resuming, several processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lfmc.calib_free.fit.student import Student

WARM_UP = 0.05  # of all steps
PACE_STEPS = 3  # after these the steps that fit into the time are known
SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class Course:
    """How much is learned: `steps` of `batch` texts each, at a share `rate` of the usual rates."""

    steps: int
    batch: int
    rate: float = 1.0


class Alone:
    """One process: nothing to share. `Together` of `lfmc.calib_free.fit.multi_gpu` has several."""

    rank, count = 0, 1

    def average(self, parameters: list[torch.nn.Parameter]) -> None:
        """Leave the gradients as they are."""

    def agree(self, steps: int) -> int:
        """What the first process says."""
        return steps


ALONE = Alone()


@dataclass(frozen=True)
class Terms:
    """Under which a student learns: when to end (of `time.monotonic`; None: never early), where
    to keep what was learned so far (None: nowhere), with whom, and whom to tell."""

    seed: int
    progress: Callable[[str], None]
    ends: float | None = None
    resume: Path | None = None
    crew: Alone = ALONE


def follow(
    student: Student,
    course: Course,
    count: int,
    loss: Callable[[Tensor], Tensor],
    terms: Terms,
    title: str,
) -> int:
    """Train a student on `count` texts: `loss` is given numbers of them, int64 `[n]`, at each step.

    Takes the course's steps, or so many as end in time, which the first few tell. Returns how many
    were taken. With `terms.resume` it goes on from there, where that is of the same training.
    """
    optimizer = student.optimizer()
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    device = learning[0].device
    step, steps = _load(terms.resume, student, optimizer, course.steps)
    first, slowest, saved = step, 0.0, time.monotonic()
    while step < steps:
        tick = time.monotonic()
        rate = course.rate * schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["highest"]
        own = numbers(count, course.batch, terms.seed, step)[terms.crew.rank :: terms.crew.count]
        with fast_products(device):
            wrong = loss(own)
            optimizer.zero_grad()
            torch.autograd.backward(wrong)
        terms.crew.average(learning)
        optimizer.step()
        step += 1
        terms.progress(f"{title}: step {step} of {steps}, loss {float(wrong.detach()):.4f}")
        now = time.monotonic()
        if terms.ends is not None and first + 1 < step <= first + PACE_STEPS:
            slowest = max(slowest, now - tick)
            if step == first + PACE_STEPS:
                left = max(0.0, terms.ends - now)
                steps = terms.crew.agree(min(steps, step + int(left / slowest)))
        if terms.resume is not None and terms.crew.rank == 0 and now - saved > SAVE_SECONDS:
            _save(terms.resume, student, optimizer, step, steps)
            saved = now
    return steps


def _save(
    path: Path, student: Student, optimizer: torch.optim.Optimizer, step: int, steps: int
) -> None:
    """Write all of a training, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    held = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**held, "step": step, "steps": steps}, partial)
    os.replace(partial, path)


def _load(
    path: Path | None, student: Student, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[int, int]:
    """The step to go on with, and the steps in all; 0 and `steps` where nothing was kept."""
    if path is None or not path.is_file():
        return 0, steps
    held = torch.load(path, map_location="cpu", weights_only=True)
    student.load_state_dict(held["student"])
    optimizer.load_state_dict(held["optimizer"])
    return int(held["step"]), int(held["steps"])


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Matrix products of bfloat16 (CPU) or TF32 (CUDA) inputs with float32 sums, meanwhile.

    Twice as fast where the CPU has such instructions; teacher and student round alike, and what
    is left is far below what 4 bits do. Whatever is measured is measured outside of this.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if device.type == "cpu" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def schedule(step: int, steps: int) -> float:
    """The share of the highest rate at a step: a short warm-up, then half a cosine to zero."""
    warm = (step + 1) / max(1.0, WARM_UP * steps)
    return min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def numbers(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Which of `count` texts a step learns from, int64 `[batch]`: every one once, then again."""
    per_round = max(1, count // batch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_round)
    order = torch.randperm(count, generator=generator)
    start = step % per_round * batch
    return order[start : start + batch]
