"""The ladder of budgets: it agrees with plans, and costs fall as sizes grow."""

from __future__ import annotations

import pytest

from lfmc.calib_free.auto.budget_ladder import HIGHEST, STEP, Ladder, ladder
from lfmc.calib_free.auto.method import Allocation
from lfmc.calib_free.grid.formats import Capabilities, Floats, Format, parse_format
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint
from tests.calib_free.conftest import MakeCheckpoint

FORMATS = tuple(Format(bits, group, True, "float16") for bits in (2, 4, 8) for group in (16, 32))
SMALL = Capabilities(FORMATS, FORMATS, FORMATS, ("bfloat16", "float32"), graph_nbytes=100)


def planned(checkpoint: Checkpoint, budget: float) -> tuple[BitPlan, Allocation]:
    seen: list[Allocation] = []
    plan = make_plan(checkpoint, SMALL, "auto", Budget(budget), observe=seen.append)
    (made,) = seen
    return plan, made


def climbed(checkpoint: Checkpoint, plan: BitPlan, made: Allocation) -> Ladder:
    floats = [r.nbytes for r in plan.rows if isinstance(parse_format(r.format), Floats)]
    fixed = plan.graph_nbytes + sum(floats)
    return ladder(checkpoint, SMALL, made.measured, fixed, lambda message: None)


def test_a_plan_of_any_step_is_on_it(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    plan, made = planned(checkpoint, 5.0)
    found = climbed(checkpoint, plan, made)
    assert plan.predicted_kl == pytest.approx(made.solution.cost)
    assert any(
        step.nbytes == plan.nbytes and step.kl == pytest.approx(plan.predicted_kl, rel=1e-4)
        for step in found.auto
    )


def test_costs_fall_and_sizes_rise_within_their_budgets(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    found = climbed(checkpoint, *planned(checkpoint, 5.0))
    for line in (found.auto, found.uniform):
        sizes, costs = [s.nbytes for s in line], [s.kl for s in line]
        assert sizes == sorted(set(sizes))
        assert costs == sorted(costs, reverse=True)
        assert len(line) > 3
    assert max(s.nbytes for s in found.auto) <= HIGHEST * checkpoint.num_params / 8
    assert len(found.auto) <= HIGHEST / STEP
    assert 0 <= found.gap < 0.01


def test_one_format_everywhere_is_never_better(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    found = climbed(checkpoint, *planned(checkpoint, 5.0))
    for step in found.uniform:
        within = [s.kl for s in found.auto if s.nbytes <= step.nbytes + checkpoint.num_params / 32]
        assert min(within) <= step.kl * (1 + 1e-6)


def test_uniform_has_the_sizes_of_its_method(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    found = climbed(checkpoint, *planned(checkpoint, 5.0))
    for budget in (3.5, 5.0, 7.0):
        plan = make_plan(checkpoint, SMALL, "uniform", Budget(budget))
        limit = budget * checkpoint.num_params / 8
        assert plan.nbytes == max(s.nbytes for s in found.uniform if s.nbytes <= limit)


def test_other_methods_measure_nothing(make_checkpoint: MakeCheckpoint) -> None:
    seen: list[Allocation] = []
    make_plan(make_checkpoint("lfm2"), SMALL, "uniform", Budget(5.0), observe=seen.append)
    assert seen == []
