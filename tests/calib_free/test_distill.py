from __future__ import annotations

import time

import pytest
import torch

from lfmc.calib_free.allocate import make_plan
from lfmc.calib_free.distill import Distilled, distill, kl
from lfmc.calib_free.formats import GENERIC
from lfmc.calib_free.plan import BitPlan
from lfmc.calib_free.student import Student
from lfmc.calib_free.training import Course, Terms, schedule
from lfmc.checkpoint import Checkpoint
from tests.calib_free.conftest import MakeCheckpoint

SHORT = Course(steps=30, batch=4, texts=16, length=24)


def learn(checkpoint: Checkpoint, plan: BitPlan, seconds: float | None = None) -> Distilled:
    ends = None if seconds is None else time.monotonic() + seconds
    return distill(checkpoint, plan, SHORT, "cpu", Terms(0, lambda message: None, ends))


@pytest.mark.parametrize("kind", ["lfm2", "lfm2_moe", "lfm3"])
def test_the_student_gets_closer_to_the_teacher(make_checkpoint: MakeCheckpoint, kind: str) -> None:
    changes = {"layer_types": ["conv", "sliding_attention", "full_attention"]}
    checkpoint = make_checkpoint(kind, **(changes if kind == "lfm3" else {}))
    plan = make_plan(checkpoint, GENERIC, "2", None)
    made = learn(checkpoint, plan)
    assert made.kl_after < 0.95 * made.kl_before
    assert made.steps == SHORT.steps


def test_the_same_seed_learns_the_same(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "3", None)
    first, again = learn(checkpoint, plan), learn(checkpoint, plan)
    assert first.kl_after == again.kl_after
    for name, parts in first.fitted.items():
        assert all(torch.equal(value, again.fitted[name][p]) for p, value in parts.items()), name


def test_no_time_means_few_steps(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    made = learn(checkpoint, make_plan(checkpoint, GENERIC, "3", None), seconds=1e-3)
    assert made.steps == 3


def test_routers_gates_and_biases_do_not_learn(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    made = learn(checkpoint, make_plan(checkpoint, GENERIC, "3", None))
    fixed = {n for n in checkpoint.tensors if n.endswith((".gate.weight", "expert_bias"))}
    assert fixed
    assert set(made.fitted) == set(checkpoint.tensors) - fixed


def test_a_student_starts_as_the_plan(make_checkpoint: MakeCheckpoint) -> None:
    from lfmc.calib_free.plan import dequantized_weights

    checkpoint = make_checkpoint("lfm2_moe")
    plan = make_plan(checkpoint, GENERIC, "uniform", None)
    planned = dequantized_weights(checkpoint, plan)
    with torch.no_grad():
        weights = Student(checkpoint, plan)()
    assert set(weights) == set(checkpoint.tensors)
    for name, weight in weights.items():
        assert torch.equal(weight, planned[name]), name


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_kl_by_hand() -> None:
    wanted = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    logits = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    by_hand = (0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()) / 2
    assert float(kl(wanted, logits)) == pytest.approx(float(by_hand), rel=1e-5)
