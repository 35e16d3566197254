"""Axes, ticks and lines of plots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfmc.report.plot import (
    Axis,
    axes,
    format_tick,
    linear_ticks,
    log_ticks,
    pareto_front,
    stairs,
)

SIZE = (400, 300)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.sampled_from([10, 1024]))
def test_linear_ticks_are_few_and_inside(low: float, span: float, base: int) -> None:
    ticks = linear_ticks(low, low + span, base)
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


@given(st.floats(1e-9, 1e3), st.floats(3.0, 1e9))
def test_log_ticks_are_few_and_inside(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 10
    assert all(low <= tick * 1.00001 and tick <= low * factor for tick in ticks)


def test_ticks_of_common_axes() -> None:
    assert linear_ticks(0, 300) == [0, 50, 100, 150, 200, 250, 300]
    assert linear_ticks(0, 32768, 1024) == [0, 8192, 16384, 24576, 32768]
    assert log_ticks(1, 16384) == [1, 10, 100, 1000, 10000]
    assert log_ticks(0.9, 30) == [1, 2, 5, 10, 20]


@pytest.mark.parametrize("log", [True, False])
def test_pixels_keep_order_and_stay_in_the_frame(log: bool) -> None:
    x, y = axes(([1, 10], [1, 1000]), ("x", "y"), size=SIZE, log=(log, log))
    assert x.start <= x.pixel(1) < x.pixel(5) < x.pixel(10) <= x.end
    assert y.end <= y.pixel(1000) < y.pixel(1) <= y.start  # up is smaller in an SVG
    assert x.pixel(1e9) == x.end
    assert x.pixel(x.low / 2 if log else -1e9) == x.start


@pytest.mark.parametrize("log", [True, False])
def test_an_axis_of_one_value_has_a_margin(log: bool) -> None:
    x, _ = axes(([3.0], [3.0]), ("x", "y"), size=SIZE, log=(log, log))
    assert x.low < 3.0 < x.high
    assert x.start < x.pixel(3.0) < x.end


def test_a_logarithmic_axis_is_even_in_ratios() -> None:
    axis = Axis(1, 100, 0, 200, True, (), "")
    assert axis.pixel(10) == 100


def test_numbers_on_axes() -> None:
    assert [format_tick(v) for v in (0, 0.001, 0.5, 1000)] == ["0", "0.001", "0.5", "1000"]
    assert [format_tick(v) for v in (1e4, 1e-5, 2e-4)] == ["10⁴", "10⁻⁵", "2·10⁻⁴"]


def test_pareto_front_and_stairs() -> None:
    points = [(2.0, 5.0), (1.0, 9.0), (3.0, 6.0), (4.0, 1.0)]
    assert pareto_front(points) == ((1.0, 9.0), (2.0, 5.0), (4.0, 1.0))
    assert stairs([(1.0, 9.0), (4.0, 1.0)]) == ((1.0, 9.0), (4.0, 9.0), (4.0, 1.0))
    assert stairs([(1.0, 9.0)]) == ((1.0, 9.0),)
    assert stairs([]) == ()
