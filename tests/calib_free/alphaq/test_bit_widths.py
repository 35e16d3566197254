"""AlphaQ's program: dynamic programming, HiGHS and brute force agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfmc.calib_free.alphaq import bit_widths as module
from lfmc.calib_free.alphaq.bit_widths import choose_widths, widths_by_milp, widths_by_table
from lfmc.errors import GateError

WIDTHS = st.lists(st.integers(1, 8), min_size=1, max_size=5, unique=True).map(sorted)
UNITS = st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 3)), min_size=1, max_size=5)


def cost(weights: Sequence[float], bits: Sequence[int]) -> float:
    return sum(w * 4.0**-b for w, b in zip(weights, bits, strict=True))


def total_bits(counts: Sequence[int], bits: Sequence[int]) -> int:
    return sum(n * b for n, b in zip(counts, bits, strict=True))


@settings(deadline=None, max_examples=80)
@given(UNITS, WIDTHS, st.integers(0, 60))
@example([(1.0, 1), (1e-6, 1)], [1, 2, 3, 4], 3)  # below the absolute gap of HiGHS without scaling
def test_both_solvers_are_optimal(
    units: list[tuple[float, int]], widths: list[int], extra: int
) -> None:
    weights, counts = map(list, zip(*units, strict=True))
    total = widths[0] * sum(counts) + extra
    allowed = [
        bits for bits in product(widths, repeat=len(units)) if total_bits(counts, bits) <= total
    ]
    best = min(cost(weights, bits) for bits in allowed)
    for solver in (widths_by_table, widths_by_milp):
        bits = solver(weights, counts, widths, total)
        assert total_bits(counts, bits) <= total
        assert cost(weights, bits) == pytest.approx(best, rel=1e-5, abs=1e-12 * max(weights))


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=20, max_size=120),
    st.sampled_from([(2, 3, 4), (2, 4, 8), (1, 2, 3, 4), (2, 3, 4, 8)]),
    st.floats(0, 1),
)
def test_both_solvers_agree_on_many_matrices(
    weights: list[float], widths: tuple[int, ...], share: float
) -> None:
    count = len(weights)
    total = widths[0] * count + int(share * count * (widths[-1] - widths[0]))
    table, milp = (
        solver(weights, [1] * count, widths, total) for solver in (widths_by_table, widths_by_milp)
    )
    assert max(sum(table), sum(milp)) <= total
    assert cost(weights, table) <= cost(weights, milp) * (1 + 1e-12)
    assert cost(weights, milp) == pytest.approx(cost(weights, table), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(UNITS, WIDTHS, st.integers(0, 40), st.integers(0, 20))
def test_more_bits_never_cost_more(
    units: list[tuple[float, int]], widths: list[int], spare: int, extra: int
) -> None:
    weights, counts = map(list, zip(*units, strict=True))
    total = widths[0] * sum(counts) + spare
    tight, loose = (choose_widths(weights, counts, widths, t) for t in (total, total + extra))
    assert cost(weights, loose) <= cost(weights, tight) * (1 + 1e-12)


def test_a_large_model_gets_more_bits_for_larger_weights() -> None:
    count = 2112
    weights = [1.0 + (i * 7919 % count) / count for i in range(count)]
    bits = choose_widths(weights, [1] * count, (2, 3, 4, 8), int(2.5 * count))
    assert sum(bits) == int(2.5 * count)
    # costs are convex in bits: a larger weight gets at least as many bits
    ordered = sorted(zip(weights, bits, strict=True))
    assert [b for _, b in ordered] == sorted(bits)


def test_highs_solves_what_is_too_large_for_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TABLE_CELLS", 0)
    assert choose_widths([1.0, 9.0], [1, 1], [2, 4], 6) == [2, 4]


def test_a_failed_solver_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        status, x, message = 4, None, "numerical difficulties"

    monkeypatch.setattr(module, "milp", lambda *args, **kwargs: Failed())
    with pytest.raises(GateError, match="no optimal widths"):
        widths_by_milp([3.0], [1], [2, 3], 2)


@pytest.mark.parametrize("solver", [widths_by_table, widths_by_milp])
def test_zero_weights_are_solved(solver: object) -> None:
    assert solver([0.0], [2], [3], 6) == [3]  # type: ignore[operator]
