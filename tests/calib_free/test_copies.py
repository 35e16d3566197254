"""Plans and budgets count every copy of a tied embedding that a target stores twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import InputError
from lfmc.machine.cache import default_cache

TWO_COPIES = replace(GENERIC, embedding_copies=2)


@pytest.mark.parametrize("method", ["uniform", "none", "8"])
def test_a_plan_counts_every_copy(demo: Checkpoint, method: str) -> None:
    budget = Budget(9.0) if method == "uniform" else None
    single, double = (make_plan(demo, c, method, budget) for c in (GENERIC, TWO_COPIES))
    single_row, double_row = (plan.row("model.embed_tokens.weight") for plan in (single, double))
    if single_row.format == double_row.format:
        assert double_row.nbytes == 2 * single_row.nbytes
    assert double.nbytes <= (double.limit_nbytes or double.nbytes)
    check_plan(double, demo, TWO_COPIES)
    with pytest.raises(InputError, match="nbytes"):
        check_plan(double, demo, GENERIC)


def test_a_budget_counts_every_copy(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("lfm2_moe"))
    resources = Resources(cache=default_cache())  # of this test run: the costs are measured once
    plan = make_plan(checkpoint, TWO_COPIES, "auto", Budget(5.0), resources=resources)
    row = plan.row("model.embed_tokens.weight")
    assert plan.nbytes <= (plan.limit_nbytes or 0)
    other_nbytes = sum(r.nbytes for r in plan.rows if r.name != row.name)
    assert other_nbytes + row.nbytes + plan.graph_nbytes == plan.nbytes
    single = make_plan(checkpoint, GENERIC, "auto", Budget(5.0), resources=resources).row(row.name)
    assert row.nbytes // 2 <= single.nbytes  # the second copy can only make the format narrower
