"""A tied embedding that an artifact holds twice counts twice, everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError

TWICE = replace(GENERIC, embedding_copies=2)


@pytest.mark.parametrize("method", ["uniform", "none", "8"])
def test_every_copy_is_in_the_plan(demo: Checkpoint, method: str) -> None:
    budget = Budget(9.0) if method == "uniform" else None
    once, twice = (make_plan(demo, c, method, budget) for c in (GENERIC, TWICE))
    one, two = (plan.row("model.embed_tokens.weight") for plan in (once, twice))
    if one.format == two.format:
        assert two.nbytes == 2 * one.nbytes
    assert twice.nbytes <= (twice.limit_nbytes or twice.nbytes)
    twice.check(demo, TWICE)
    with pytest.raises(InputError, match="nbytes"):
        twice.check(demo, GENERIC)


def test_a_budget_counts_them(demo: Checkpoint) -> None:
    plan = make_plan(demo, TWICE, "auto", Budget(5.0))
    row = plan.row("model.embed_tokens.weight")
    assert plan.nbytes <= (plan.limit_nbytes or 0)
    others = sum(r.nbytes for r in plan.rows if r.name != row.name)
    assert others + row.nbytes + plan.graph_nbytes == plan.nbytes
    wide = make_plan(demo, GENERIC, "auto", Budget(5.0)).row(row.name)
    assert row.nbytes // 2 <= wide.nbytes  # what it costs more makes it narrower, if anything
