"""Plots as data: axes with ticks, lines and marks.

The template `parts.html` draws plots as SVG; a page's script can draw more into the same frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]

HALF_WIDTH, FULL_WIDTH = (460, 300), (1040, 400)  # of a page on a desktop, in pixels


@dataclass(frozen=True)
class Axis:
    """An axis for values `low` to `high` on pixels `start` to `end`; ticks are (value, label)."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    label: str

    def pixel(self, value: float) -> float:
        """Return the pixel of a value; values outside the axis are clamped to its ends."""
        value = min(max(value, self.low), self.high)
        low, high, scaled = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (scaled - low) / (high - low), 1)


@dataclass(frozen=True)
class Line:
    """A line through points. `style` names a CSS class; `title` is the tooltip."""

    points: tuple[Point, ...]
    style: str
    title: str


@dataclass(frozen=True)
class Mark:
    """A dot of `radius` pixels. `style` names a CSS class; `title` is the tooltip."""

    point: Point
    radius: float
    style: str
    title: str
    label: str = ""
    above: bool = False  # whether the label is above the mark


@dataclass(frozen=True)
class Plot:
    """A frame of `width` x `height` pixels with axes, lines and marks."""

    title: str
    width: int
    height: int
    x: Axis
    y: Axis
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    name: str = ""

    def path(self, points: Iterable[Point]) -> str:
        """Return the `d` attribute of an SVG path."""
        return "M" + "L".join(f"{self.x.pixel(x):g} {self.y.pixel(y):g}" for x, y in points)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_tick(value: float) -> str:
    """Format a number on an axis: `0.01`, `500`, or `10⁴` for very large and small values."""
    if 1e-3 <= abs(value) < 1e4 or value == 0:
        return f"{value:g}"
    digits, power = f"{value:.0e}".split("e")
    power_of_ten = "10" + str(int(power)).translate(_SUPERSCRIPT)
    return power_of_ten if digits == "1" else f"{digits}·{power_of_ten}"


def axes(
    values: tuple[Sequence[float], Sequence[float]],
    labels: tuple[str, str],
    *,
    size: tuple[int, int],
    log: tuple[bool, bool],
    pad: tuple[float, float] = (0.03, 0.04),
    left: int = 56,
    formats: tuple[Callable[[float], str], Callable[[float], str]] = (format_tick, format_tick),
    base: tuple[int, int] = (10, 10),
) -> tuple[Axis, Axis]:
    """Return axes for values of x and y, in a frame of `size` with `left` pixels for labels.

    `pad` extends the range of an axis at both ends by this fraction. `formats` format the ticks.
    Linear ticks are round numbers in a `base` of 10 or 1024. Values of a logarithmic axis must be
    above 0.
    """
    width, height = size
    spans = ((left, width - 16), (height - 38, 26))
    xy = []
    for axis_values, label, is_log, format_value, fraction, radix, (start, end) in zip(
        values, labels, log, formats, pad, base, spans, strict=True
    ):
        low, high = _pad_range(min(axis_values), max(axis_values), fraction, is_log)
        positions = log_ticks(low, high) if is_log else linear_ticks(low, high, radix)
        ticks = tuple((position, format_value(position)) for position in positions)
        xy.append(Axis(low, high, start, end, is_log, ticks, label))
    return xy[0], xy[1]


def _pad_range(low: float, high: float, fraction: float, log: bool) -> tuple[float, float]:
    """Extend a range by a fraction at each end; a range of one value gets a margin."""
    if log:
        low, high = math.log(low), math.log(high)
    margin = (high - low) * fraction or (0.0 if high > low else 0.5 * (abs(high) or 1.0))
    low, high = low - margin, high + margin
    return (math.exp(low), math.exp(high)) if log else (low, high)


def linear_ticks(low: float, high: float, base: int = 10, limit: int = 7) -> list[float]:
    """Return about `limit` round numbers from `low` to `high`.

    Steps are 1, 2 or 5 times a power of 10, or a power of 2 for a `base` of 1024.
    """
    span = high - low
    if base == 1024:
        step = 2.0 ** math.ceil(math.log2(span / limit))
    else:
        power = 10.0 ** math.floor(math.log10(span / limit))
        step = next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= limit)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def log_ticks(low: float, high: float, limit: int = 7) -> list[float]:
    """Return powers of ten from `low` to `high`, with multiples of 2 and 5 in a short range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    stride = -(-(last - first) // limit)
    ticks = [m * 10.0**e for e in range(first, last + 1, stride) for m in factors]
    return [t for t in (float(f"{t:.6g}") for t in ticks) if low <= t * 1.000001 and t <= high]


def stairs(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return a step line: each point's y stays constant until the next point's x."""
    corners = [(after[0], before[1]) for before, after in pairwise(points)]
    steps = [p for pair in zip(points, corners, strict=False) for p in pair]
    return (*steps, *points[-1:])


def pareto_front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the Pareto front: points sorted by x, each with a smaller y than all before it."""
    front: list[Point] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return tuple(front)
