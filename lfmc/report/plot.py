"""Plots as data: axes with ticks, and lines and marks in the pixels of an SVG.

The template `parts.html` draws them; a script may draw more into the same frame, by `Axis`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` over pixels from `start` to `end`; ticks are value and label."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    label: str

    def pixel(self, value: float) -> float:
        """Where a value stands; outside of the axis it stands at its end."""
        value = min(max(value, self.low), self.high)
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (at - low) / (high - low), 1)


@dataclass(frozen=True)
class Line:
    """A line through points; `look` is a class of the style sheet, `title` what it is."""

    points: tuple[Point, ...]
    look: str
    title: str


@dataclass(frozen=True)
class Mark:
    """A dot of `radius` pixels with a title that shows when it is pointed at."""

    point: Point
    radius: float
    look: str
    title: str
    label: str = ""


@dataclass(frozen=True)
class Plot:
    """A frame of `width` x `height` pixels with everything in it; `title` says what it shows."""

    title: str
    width: int
    height: int
    x: Axis
    y: Axis
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    name: str = ""

    def path(self, points: Iterable[Point]) -> str:
        """The `d` of an SVG path."""
        return "M" + "L".join(f"{self.x.pixel(x):g} {self.y.pixel(y):g}" for x, y in points)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain(value: float) -> str:
    """A number on an axis: `0.01`, `500`, and `10⁴` for a power of ten that is long in digits."""
    if 1e-3 <= abs(value) < 1e4 or value == 0:
        return f"{value:g}"
    digits, power = f"{value:.0e}".split("e")
    raised = "10" + str(int(power)).translate(_RAISED)
    return raised if digits == "1" else f"{digits}·{raised}"


def axes(
    values: tuple[Sequence[float], Sequence[float]],
    labels: tuple[str, str],
    *,
    size: tuple[int, int],
    log: tuple[bool, bool],
    pad: tuple[float, float] = (0.03, 0.04),
    left: int = 56,
    texts: tuple[Callable[[float], str], Callable[[float], str]] = (plain, plain),
    base: tuple[int, int] = (10, 10),
) -> tuple[Axis, Axis]:
    """Axes that hold all values of x and of y, in a frame of `size` with `left` pixels for ticks.

    `pad` is the share of its length that an axis goes beyond the values; `texts` write the ticks.
    Linear ticks are round numbers to a `base` of 10, or of 1024. Values of a logarithmic axis are
    above 0.
    """
    width, height = size
    spans = ((left, width - 16), (height - 38, 26))
    made = []
    for own, label, is_log, text, share, radix, (start, end) in zip(
        values, labels, log, texts, pad, base, spans, strict=True
    ):
        low, high = _padded(min(own), max(own), share, is_log)
        ticks = log_ticks(low, high) if is_log else linear_ticks(low, high, radix)
        shown = tuple((tick, text(tick)) for tick in ticks)
        made.append(Axis(low, high, start, end, is_log, shown, label))
    return made[0], made[1]


def _padded(low: float, high: float, share: float, log: bool) -> tuple[float, float]:
    """The range a share longer at each end; one value alone gets room around it."""
    if log:
        low, high = math.log(low), math.log(high)
    room = (high - low) * share or (0.0 if high > low else 0.5 * (abs(high) or 1.0))
    low, high = low - room, high + room
    return (math.exp(low), math.exp(high)) if log else (low, high)


def linear_ticks(low: float, high: float, base: int = 10, most: int = 7) -> list[float]:
    """Round numbers from `low` to `high`, about `most` of them.

    Steps are 1, 2 or 5 times a power of 10, or with a `base` of 1024 a power of 2.
    """
    span = high - low
    if base == 1024:
        step = 2.0 ** math.ceil(math.log2(span / most))
    else:
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of ten from `low` to `high`; with 2 and 5 between them where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    stride = -(-(last - first) // most)
    every = [m * 10.0**e for e in range(first, last + 1, stride) for m in factors]
    return [t for t in (float(f"{t:.6g}") for t in every) if low <= t * 1.000001 and t <= high]


def stairs(points: Sequence[Point]) -> tuple[Point, ...]:
    """A line that keeps each point's y until the next point's x."""
    corners = [(after[0], before[1]) for before, after in pairwise(points)]
    found = [p for pair in zip(points, corners, strict=False) for p in pair]
    return (*found, *points[-1:])


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that none beats in both: for rising x, each lower in y than all before it."""
    found: list[Point] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return tuple(found)
