from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.calib_free import solve as module
from lfmc.calib_free.solve import Choice, Option, smallest, solve
from lfmc.errors import InputError

OPTIONS = st.lists(
    st.builds(
        Option, st.floats(0, 10, width=32), st.integers(1, 60), st.sampled_from(["even", "odd"])
    ),
    min_size=1,
    max_size=4,
).map(tuple)
LOOSE = st.lists(st.builds(Choice, OPTIONS), min_size=1, max_size=5)
BUNDLED = st.lists(
    st.builds(
        Choice,
        OPTIONS.map(lambda own: (Option(11.0, 3, "even"), Option(12.0, 2, "odd"), *own)),
        st.sampled_from([None, "layer 0", "layer 1"]),
    ),
    min_size=1,
    max_size=4,
)


def allowed(choices: list[Choice]) -> Iterable[list[Option]]:
    """All solutions, layouts agreeing within a bundle."""
    for options in product(*(choice.options for choice in choices)):
        layouts: dict[object, set[object]] = {}
        for choice, option in zip(choices, options, strict=True):
            if choice.bundle is not None:
                layouts.setdefault(choice.bundle, set()).add(option.layout)
        if all(len(found) == 1 for found in layouts.values()):
            yield list(options)


def check(choices: list[Choice], spare: int) -> None:
    least = smallest(choices)
    limit = least + spare
    found = solve(choices, limit)
    sizes = [(sum(o.nbytes for o in own), sum(o.cost for o in own)) for own in allowed(choices)]
    assert least == min(size for size, _ in sizes)
    best = min(cost for size, cost in sizes if size <= limit)
    picked = [c.options[p] for c, p in zip(choices, found.picks, strict=True)]
    assert picked in list(allowed(choices))
    assert found.nbytes == sum(o.nbytes for o in picked) <= limit
    assert found.cost == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert found.bound <= best + 1e-6


@settings(deadline=None, max_examples=60)
@given(LOOSE, st.integers(0, 150))
def test_it_is_the_best_of_all_choices(choices: list[Choice], spare: int) -> None:
    check(choices, spare)


@settings(deadline=None, max_examples=60)
@given(BUNDLED, st.integers(0, 150))
def test_bundles_agree_and_are_the_best_of_all_choices(choices: list[Choice], spare: int) -> None:
    check(choices, spare)


@settings(deadline=None, max_examples=30)
@given(LOOSE, st.integers(0, 100), st.integers(0, 100))
def test_more_bytes_never_cost_more(choices: list[Choice], spare: int, more: int) -> None:
    least = smallest(choices)
    tight, loose = solve(choices, least + spare), solve(choices, least + spare + more)
    assert loose.cost <= tight.cost * (1 + 1e-4) + 1e-6


@settings(deadline=None, max_examples=30)
@given(LOOSE, st.integers(0, 100))
def test_without_the_exact_solver_the_stated_gap_holds(choices: list[Choice], spare: int) -> None:
    limit = smallest(choices) + spare
    exact = solve(choices, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MILP_BINARIES", 0)
        near = solve(choices, limit)
    assert near.nbytes <= limit
    assert near.cost * (1 - near.gap) <= exact.cost * (1 + 1e-5) + 1e-9


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(InputError, match="fits the budget") as caught:
        solve([Choice((Option(1.0, 10), Option(0.5, 20)))], 9)
    assert caught.value.expected == "at least 10 bytes"


def test_the_solver_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with module.solver_silent():
        os.write(1, b"HighsMipSolverData::noise\n")
    os.write(1, b"result\n")
    assert capfd.readouterr() == ("result\n", "")
