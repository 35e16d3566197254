from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfmc.calib_free.alphaq.allocation import AlphaQOptions, allocate
from lfmc.errors import InputError


def cost(alphas: list[float], variances: list[float], bits: tuple[int, ...], gamma: float) -> float:
    """Return the paper's objective, written out."""
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
@example([(6.0, 1.0), (1.5, 1.0)], (1, 2, 3, 4), 3.0, 10.0)  # costs of very different size
def test_the_widths_are_optimal(
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


def test_a_matrix_without_a_tail_gets_the_fewest_bits() -> None:
    assert allocate([3.0, 3.0, math.inf], [1.0, 1.0, 1.0], [2, 3], 2.7) == [3, 3, 2]


def test_no_matrices_need_no_widths() -> None:
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


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": -1.0},
        {"gamma": math.nan},
        {"gamma": 1e9},
        {"bits": ()},
        {"bits": (0, 4)},
        {"bits": (4, 9)},
        {"bits": (4, 4)},
        {"bits": (2.5, 4)},
        {"block": 1},
        {"tail": 0.0},
        {"tail": 1.0},
        {"tail": math.nan},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        AlphaQOptions(**options)


def test_the_default_is_the_paper() -> None:
    assert AlphaQOptions() == AlphaQOptions(gamma=1.0, bits=None, block=128, tail=0.1)
