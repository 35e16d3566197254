"""The training loop of students: learning rates, batches, deadline, resuming, processes."""

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
PACE_STEPS = 3  # after this many steps, the loop estimates how many fit before the deadline
SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class TrainingSchedule:
    """`steps` of `batch` texts each; `rate` scales the learning rates."""

    steps: int
    batch: int
    rate: float = 1.0


class SingleProcess:
    """Training in one process; `MultiProcess` of `lfmc.calib_free.fit.multi_gpu` uses several."""

    rank, count = 0, 1

    def average(self, parameters: list[torch.nn.Parameter]) -> None:
        """Leave the gradients as they are."""

    def broadcast_steps(self, steps: int) -> int:
        """Return the `steps` of the first process."""
        return steps


SINGLE_PROCESS = SingleProcess()


@dataclass(frozen=True)
class TrainingOptions:
    """How a student is trained.

    `progress` receives a message at each step. `deadline` is a time of `time.monotonic`; with None,
    training takes all steps. `state_path` is the file that stores the state of the training so
    that it can resume; with None, nothing is stored.
    """

    seed: int
    progress: Callable[[str], None]
    deadline: float | None = None
    state_path: Path | None = None
    processes: SingleProcess = SINGLE_PROCESS


def train(
    student: Student,
    schedule: TrainingSchedule,
    count: int,
    loss: Callable[[Tensor], Tensor],
    options: TrainingOptions,
    title: str,
) -> int:
    """Train a student on `count` texts. Each step calls `loss` with text indices, int64 `[n]`.

    Takes the steps of the schedule, or as many as fit before the deadline, estimated from the first
    few steps. Returns the number of steps. Resumes from `options.state_path` if that file exists.
    """
    optimizer, processes = student.optimizer(), options.processes
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    step, steps = _load(options.state_path, student, optimizer, schedule.steps)
    first_step, slowest, save_time = step, 0.0, time.monotonic()
    while step < steps:
        step_start = time.monotonic()
        rate = schedule.rate * rate_factor(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["highest"]
        batch = batch_indices(count, schedule.batch, options.seed, step)
        with fast_matmuls(device):
            batch_loss = loss(batch[processes.rank :: processes.count])
            optimizer.zero_grad()
            torch.autograd.backward(batch_loss)
        processes.average(parameters)
        optimizer.step()
        step += 1
        value = float(batch_loss.detach())
        options.progress(f"{title}: step {step} of {steps}, loss {value:.4f}")
        now = time.monotonic()
        if options.deadline is not None and first_step + 1 < step <= first_step + PACE_STEPS:
            slowest = max(slowest, now - step_start)
            if step == first_step + PACE_STEPS:
                seconds = max(0.0, options.deadline - now)
                steps = processes.broadcast_steps(min(steps, step + int(seconds / slowest)))
        due = now - save_time > SAVE_SECONDS
        if options.state_path is not None and processes.rank == 0 and due:
            _save(options.state_path, student, optimizer, step, steps)
            save_time = now
    return steps


def _save(
    path: Path, student: Student, optimizer: torch.optim.Optimizer, step: int, steps: int
) -> None:
    """Write the state of a training atomically."""
    partial = path.with_name(path.name + ".partial")
    states = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "step": step, "steps": steps}, partial)
    os.replace(partial, path)


def _load(
    path: Path | None, student: Student, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[int, int]:
    """Load a state. Returns the next step and the number of steps; 0 and `steps` without a file."""
    if path is None or not path.is_file():
        return 0, steps
    state = torch.load(path, map_location="cpu", weights_only=True)
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), int(state["steps"])


@contextmanager
def fast_matmuls(device: torch.device) -> Iterator[None]:
    """Use bfloat16 (CPU) or TF32 (CUDA) inputs with float32 sums for matrix products.

    This is twice as fast on CPUs with such instructions. Teacher and student round in the same
    way, and the remaining error is far below that of 4 bits. Use it only in training: errors and KL
    are measured in full precision.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if device.type == "cpu" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rate_factor(step: int, steps: int) -> float:
    """Return a step's learning rate as a share of the highest: warm-up, then half a cosine to 0."""
    warm = (step + 1) / max(1.0, WARM_UP * steps)
    return min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Return the text indices of a step, int64 `[batch]`; an epoch uses each of `count` once."""
    steps_per_epoch = max(1, count // batch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // steps_per_epoch)
    order = torch.randperm(count, generator=generator)
    start = step % steps_per_epoch * batch
    return order[start : start + batch]
