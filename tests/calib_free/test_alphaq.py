from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfmc.calib_free.alphaq import allocate
from lfmc.errors import GateError, InputError


def cost(alphas: list[float], variances: list[float], bits: tuple[int, ...], gamma: float) -> float:
    """The paper's objective, written out."""
    ordered = sorted(alphas)
    count = len(ordered)
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return sum(
        (median / a) ** gamma * max(v, 1e-12) * 2.0 ** (-2 * b)
        for a, v, b in zip(alphas, variances, bits, strict=True)
    )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(1.5, 8), st.floats(1e-4, 1)), min_size=1, max_size=5),
    st.sampled_from([(2, 3, 4), (1, 2, 3, 4), (2, 3, 4, 8)]),
    st.sampled_from([2.0, 2.5, 3.0, 3.5, 9.0]),
    st.sampled_from([1.0, 10.0]),
)
@example([(6.0, 1.0), (1.5, 1.0)], (1, 2, 3, 4), 3.0, 10.0)  # below HiGHS' absolute gap, unscaled
def test_it_is_the_best_of_all_choices(
    matrices: list[tuple[float, float]], widths: tuple[int, ...], mean: float, gamma: float
) -> None:
    alphas, variances = map(list, zip(*matrices, strict=True))
    bits = allocate(alphas, variances, widths, mean, gamma)
    assert sum(bits) <= mean * len(bits) + 1e-9
    best = min(
        cost(alphas, variances, choice, gamma)
        for choice in product(widths, repeat=len(alphas))
        if sum(choice) <= mean * len(choice) + 1e-9
    )
    assert cost(alphas, variances, tuple(bits), gamma) == pytest.approx(best, rel=1e-5)


def test_a_heavier_tail_gets_more_bits() -> None:
    assert allocate([2.0, 8.0], [1.0, 1.0], [2, 4], 3.0, gamma=1.0) == [4, 2]


def test_a_matrix_without_a_tail_gets_the_fewest() -> None:
    assert allocate([3.0, 3.0, math.inf], [1.0, 1.0, 1.0], [2, 3], 2.7) == [3, 3, 2]


def test_no_matrices_no_widths() -> None:
    assert allocate([], [], [2, 3], 2.5) == []


@pytest.mark.parametrize(
    ("alphas", "variances", "widths", "mean"),
    [
        ([3.0], [1.0], [2, 3], 1.5),
        ([3.0], [1.0, 1.0], [2, 3], 2.5),
        ([3.0], [1.0], [], 2.5),
        ([-1.0], [1.0], [2], 2.5),
        ([math.nan], [1.0], [2], 2.5),
        ([math.inf], [1.0], [2], 2.5),
    ],
)
def test_bad_input_is_refused(
    alphas: list[float], variances: list[float], widths: list[int], mean: float
) -> None:
    with pytest.raises(InputError):
        allocate(alphas, variances, widths, mean)


def test_a_solver_that_fails_is_no_reason_to_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        status, x, message = 4, None, "numerical difficulties"

    monkeypatch.setattr("lfmc.calib_free.alphaq.milp", lambda *args, **kwargs: Failed())
    with pytest.raises(GateError, match="no optimal widths"):
        allocate([3.0], [1.0], [2, 3], 2.5)
