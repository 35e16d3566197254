"""The budget ladder agrees with plans, and costs fall as sizes grow."""

from __future__ import annotations

import pytest

from lfmc.calib_free.auto.budget_ladder import HIGHEST, STEP, Ladder, compute_ladder
from lfmc.calib_free.auto.method import Allocation
from lfmc.calib_free.grid.formats import Capabilities, Floats, Format, parse_format
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint
from tests.calib_free.conftest import MakeCheckpoint

FORMATS = tuple(Format(bits, group, True, "float16") for bits in (2, 4, 8) for group in (16, 32))
SMALL = Capabilities(FORMATS, FORMATS, FORMATS, ("bfloat16", "float32"), graph_nbytes=100)


def plan_auto(checkpoint: Checkpoint, budget: float) -> tuple[BitPlan, Allocation]:
    allocations: list[Allocation] = []
    plan = make_plan(checkpoint, SMALL, "auto", Budget(budget), observe=allocations.append)
    (allocation,) = allocations
    return plan, allocation


def ladder_of(checkpoint: Checkpoint, plan: BitPlan, allocation: Allocation) -> Ladder:
    floats = [r.nbytes for r in plan.rows if isinstance(parse_format(r.format), Floats)]
    fixed = plan.graph_nbytes + sum(floats)
    return compute_ladder(checkpoint, SMALL, allocation.matrix_costs, fixed, lambda message: None)


def test_the_ladder_contains_the_plan(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    plan, allocation = plan_auto(checkpoint, 5.0)
    ladder = ladder_of(checkpoint, plan, allocation)
    assert plan.predicted_kl == pytest.approx(allocation.solution.cost)
    assert any(
        step.nbytes == plan.nbytes and step.kl == pytest.approx(plan.predicted_kl, rel=1e-4)
        for step in ladder.auto
    )


def test_costs_fall_and_sizes_rise_within_their_budgets(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    ladder = ladder_of(checkpoint, *plan_auto(checkpoint, 5.0))
    for steps in (ladder.auto, ladder.uniform):
        sizes, costs = [s.nbytes for s in steps], [s.kl for s in steps]
        assert sizes == sorted(set(sizes))
        assert costs == sorted(costs, reverse=True)
        assert len(steps) > 3
    assert max(s.nbytes for s in ladder.auto) <= HIGHEST * checkpoint.num_params / 8
    assert len(ladder.auto) <= HIGHEST / STEP
    assert 0 <= ladder.gap < 0.01


def test_uniform_is_never_better_than_auto(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    ladder = ladder_of(checkpoint, *plan_auto(checkpoint, 5.0))
    for step in ladder.uniform:
        kls = [s.kl for s in ladder.auto if s.nbytes <= step.nbytes + checkpoint.num_params / 32]
        assert min(kls) <= step.kl * (1 + 1e-6)


def test_uniform_steps_have_the_sizes_of_uniform_plans(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    ladder = ladder_of(checkpoint, *plan_auto(checkpoint, 5.0))
    for budget in (3.5, 5.0, 7.0):
        plan = make_plan(checkpoint, SMALL, "uniform", Budget(budget))
        limit = budget * checkpoint.num_params / 8
        assert plan.nbytes == max(s.nbytes for s in ladder.uniform if s.nbytes <= limit)


def test_other_methods_measure_no_costs(make_checkpoint: MakeCheckpoint) -> None:
    allocations: list[Allocation] = []
    budget = Budget(5.0)
    make_plan(make_checkpoint("lfm2"), SMALL, "uniform", budget, observe=allocations.append)
    assert allocations == []
