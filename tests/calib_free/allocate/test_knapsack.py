from __future__ import annotations

import os
import random
from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.calib_free.allocate import knapsack as module
from lfmc.calib_free.allocate.highs import silence_solver
from lfmc.calib_free.allocate.knapsack import min_nbytes, solve
from lfmc.calib_free.allocate.knapsack_problem import Choice, Option
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
        OPTIONS.map(lambda options: (Option(11.0, 3, "even"), Option(12.0, 2, "odd"), *options)),
        st.sampled_from([None, "layer 0", "layer 1"]),
    ),
    min_size=1,
    max_size=4,
)


def allowed_solutions(choices: list[Choice]) -> Iterable[list[Option]]:
    """Yield all solutions in which every bundle has one layout."""
    for options in product(*(choice.options for choice in choices)):
        layouts: dict[object, set[object]] = {}
        for choice, option in zip(choices, options, strict=True):
            if choice.bundle is not None:
                layouts.setdefault(choice.bundle, set()).add(option.layout)
        if all(len(layout_names) == 1 for layout_names in layouts.values()):
            yield list(options)


def check_optimal(choices: list[Choice], spare: int) -> None:
    minimum = min_nbytes(choices)
    limit = minimum + spare
    solution = solve(choices, limit)
    sizes = [
        (sum(option.nbytes for option in options), sum(option.cost for option in options))
        for options in allowed_solutions(choices)
    ]
    assert minimum == min(size for size, _ in sizes)
    best = min(cost for size, cost in sizes if size <= limit)
    picked_options = [
        choice.options[pick] for choice, pick in zip(choices, solution.picks, strict=True)
    ]
    assert picked_options in list(allowed_solutions(choices))
    assert solution.nbytes == sum(option.nbytes for option in picked_options) <= limit
    assert solution.cost == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert solution.bound <= best + 1e-6


@settings(deadline=None, max_examples=60)
@given(LOOSE, st.integers(0, 150))
def test_the_solution_is_optimal(choices: list[Choice], spare: int) -> None:
    check_optimal(choices, spare)


@settings(deadline=None, max_examples=60)
@given(BUNDLED, st.integers(0, 150))
def test_bundles_share_a_layout_and_the_solution_is_optimal(
    choices: list[Choice], spare: int
) -> None:
    check_optimal(choices, spare)


@settings(deadline=None, max_examples=30)
@given(LOOSE, st.integers(0, 100), st.integers(0, 100))
def test_more_bytes_never_cost_more(choices: list[Choice], spare: int, extra: int) -> None:
    minimum = min_nbytes(choices)
    tight, loose = solve(choices, minimum + spare), solve(choices, minimum + spare + extra)
    assert loose.cost <= tight.cost * (1 + 1e-4) + 1e-6


@settings(deadline=None, max_examples=30)
@given(LOOSE, st.integers(0, 100))
def test_without_the_exact_solver_the_stated_gap_holds(choices: list[Choice], spare: int) -> None:
    limit = min_nbytes(choices) + spare
    exact = solve(choices, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MILP_BINARIES", 0)
        approximate = solve(choices, limit)
    assert approximate.nbytes <= limit
    assert approximate.cost * (1 - approximate.gap) <= exact.cost * (1 + 1e-5) + 1e-9


@settings(deadline=None, max_examples=30)
@given(BUNDLED, st.integers(0, 100), st.integers(0, 60))
def test_bundles_keep_the_stated_gap_as_budgets_grow(
    choices: list[Choice], spare: int, extra: int
) -> None:
    minimum = min_nbytes(choices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MILP_BINARIES", 0)
        tight, loose = solve(choices, minimum + spare), solve(choices, minimum + spare + extra)
    assert tight.nbytes <= minimum + spare
    assert loose.nbytes <= minimum + spare + extra
    assert loose.bound <= tight.cost * (1 + 1e-9) + 1e-9
    for solution, limit in ((tight, minimum + spare), (loose, minimum + spare + extra)):
        best = min(
            sum(option.cost for option in options)
            for options in allowed_solutions(choices)
            if sum(option.nbytes for option in options) <= limit
        )
        assert solution.bound <= best * (1 + 1e-9) + 1e-9
        assert best <= solution.cost * (1 + 1e-9)


def test_a_budget_between_two_sizes_takes_the_smaller() -> None:
    choices = [Choice((Option(3.0, 10), Option(1.0, 20)))]
    assert [solve(choices, limit).nbytes for limit in (10, 19, 20, 1000)] == [10, 10, 20, 20]


def test_a_choice_of_one_option_is_solved() -> None:
    choices = [Choice((Option(3.0, 10),)), Choice((Option(1.0, 5, "a"),), "bundle")]
    assert solve(choices, 15) == module.Solution((0, 0), 4.0, 15, 4.0)


def test_no_choices_need_no_bytes() -> None:
    assert min_nbytes([]) == 0
    assert solve([], 0).picks == ()


def test_a_bundle_without_a_common_layout_is_refused() -> None:
    choices = [Choice((Option(1.0, 1, "a"),), "one"), Choice((Option(1.0, 1, "b"),), "one")]
    with pytest.raises(InputError, match="no layout is common"):
        min_nbytes(choices)


def test_a_layout_that_some_members_lack_is_not_used() -> None:
    wide, narrow = Option(0.0, 1, "best for one"), Option(5.0, 2, "common")
    choices = [Choice((wide, narrow), "one"), Choice((narrow,), "one")]
    assert solve(choices, 100).picks == (1, 0)


@pytest.mark.parametrize("bundled", [False, True])
def test_a_large_model_is_solved_to_a_small_gap(bundled: bool) -> None:
    generator = random.Random(0)
    choices = []
    for unit in range(2112):
        weight = generator.lognormvariate(0, 1)
        options = tuple(
            Option(weight * 4.0**-bits * (1 + group / 400), 4000 * bits + 512000 // group, group)
            for bits in (2, 3, 4, 5, 6, 8)
            for group in (32, 64, 128)
        )
        choices.append(Choice(options, unit // 96 if bundled else None))
    limit = 2 * min_nbytes(choices)
    solution = solve(choices, limit)
    assert solution.nbytes <= limit
    assert solution.gap < 1e-3


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(InputError, match="fits the budget") as caught:
        solve([Choice((Option(1.0, 10), Option(0.5, 20)))], 9)
    assert caught.value.expected == "at least 10 bytes"


def test_the_solver_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with silence_solver():
        os.write(1, b"HighsMipSolverData::noise\n")
    os.write(1, b"result\n")
    assert capfd.readouterr() == ("result\n", "")
