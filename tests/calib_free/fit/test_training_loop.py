from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.fit import training_loop as training
from lfmc.calib_free.fit.student import Student
from lfmc.calib_free.fit.training_loop import (
    TrainingOptions,
    TrainingSchedule,
    batch_indices,
    fast_matmuls,
    rate_factor,
    train,
)
from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import make_plan
from tests.calib_free.conftest import MakeCheckpoint


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    rates = [rate_factor(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_an_epoch_uses_every_text_once() -> None:
    epoch = torch.cat([batch_indices(12, 4, seed=3, step=step) for step in range(3)])
    assert sorted(epoch.tolist()) == list(range(12))
    assert batch_indices(12, 4, 3, 0).tolist() != batch_indices(12, 4, 3, 3).tolist()
    assert batch_indices(3, 8, 0, 5).numel() == 3  # fewer texts than a batch


def mean_square(student: Student) -> torch.Tensor:
    """A loss that a few steps can lower."""
    return torch.stack([weight.square().mean() for weight in student().values()]).sum()


def train_briefly(student: Student, steps: int = 12, **settings: object) -> int:
    schedule = TrainingSchedule(steps, batch=2)
    options = TrainingOptions(0, lambda message: None, **settings)  # type: ignore[arg-type]
    return train(student, schedule, 8, lambda indices: mean_square(student), options, "test")


def test_a_deadline_limits_the_steps(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    student = Student(checkpoint, make_plan(checkpoint, GENERIC, "3", None))
    assert train_briefly(student, deadline=time.monotonic()) == training.PACE_STEPS


def test_an_interrupted_training_resumes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "3", None)
    uninterrupted = Student(checkpoint, plan)
    train_briefly(uninterrupted)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    path, interrupted = tmp_path / "state", Student(checkpoint, plan)

    def stop(message: str) -> None:
        if "step 7 " in message:
            raise KeyboardInterrupt

    def resume(student: Student, progress: Callable[[str], None]) -> None:
        options = TrainingOptions(0, progress, state_path=path)
        train(student, schedule, 8, lambda indices: mean_square(student), options, "test")

    schedule = TrainingSchedule(12, batch=2)
    with pytest.raises(KeyboardInterrupt):
        resume(interrupted, stop)
    resumed = Student(checkpoint, plan)
    messages: list[str] = []
    resume(resumed, messages.append)
    assert messages[0].startswith("test: step 7 of 12")
    for name, weight in uninterrupted().items():
        assert torch.equal(resumed()[name], weight), name


def test_fast_matmuls_restores_the_precision_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    with suppress(ZeroDivisionError), fast_matmuls(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
