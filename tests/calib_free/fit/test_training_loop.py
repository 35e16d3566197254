from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.fit import training_loop as training
from lfmc.calib_free.fit.student import Student
from lfmc.calib_free.fit.training_loop import (
    Course,
    Terms,
    fast_products,
    follow,
    numbers,
    schedule,
)
from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import make_plan
from tests.calib_free.conftest import MakeCheckpoint


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_every_text_is_read_once_a_round() -> None:
    seen = torch.cat([numbers(12, 4, seed=3, step=step) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))
    assert numbers(12, 4, 3, 0).tolist() != numbers(12, 4, 3, 3).tolist()
    assert numbers(3, 8, 0, 5).numel() == 3  # fewer texts than a batch


def distance(student: Student) -> torch.Tensor:
    """Something that a few steps can lower."""
    return torch.stack([weight.square().mean() for weight in student().values()]).sum()


def learn(student: Student, steps: int = 12, **terms: object) -> int:
    course = Course(steps, batch=2)
    own = Terms(0, lambda message: None, **terms)  # type: ignore[arg-type]
    return follow(student, course, 8, lambda own: distance(student), own, "test")


def test_no_time_means_few_steps(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    student = Student(checkpoint, make_plan(checkpoint, GENERIC, "3", None))
    assert learn(student, ends=time.monotonic()) == training.PACE_STEPS


def test_a_training_that_was_stopped_goes_on(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "3", None)
    whole = Student(checkpoint, plan)
    learn(whole)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    path, stopped = tmp_path / "state", Student(checkpoint, plan)

    def stop(message: str) -> None:
        if "step 7 " in message:
            raise KeyboardInterrupt

    course = Course(12, batch=2)
    with pytest.raises(KeyboardInterrupt):
        follow(
            stopped, course, 8, lambda own: distance(stopped), Terms(0, stop, resume=path), "test"
        )
    again = Student(checkpoint, plan)
    told: list[str] = []
    follow(
        again, course, 8, lambda own: distance(again), Terms(0, told.append, resume=path), "test"
    )
    assert told[0].startswith("test: step 7 of 12")
    for name, weight in whole().items():
        assert torch.equal(again()[name], weight), name


def test_products_are_exact_again_afterwards() -> None:
    before = torch.get_float32_matmul_precision()
    with suppress(ZeroDivisionError), fast_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
