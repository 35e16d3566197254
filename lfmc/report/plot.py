"""Plots as data: axes with ticks, and lines and marks in the pixels of an SVG.

The template `parts.html` draws them; a script may draw more into the same frame, by `Axis`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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


def _plain(value: float) -> str:
    return f"{value:g}"


def axes(
    values: tuple[Sequence[float], Sequence[float]],
    labels: tuple[str, str],
    *,
    size: tuple[int, int],
    log: tuple[bool, bool],
    margins: tuple[int, int, int] = (58, 12, 40),
    texts: tuple[Callable[[float], str], Callable[[float], str]] = (_plain, _plain),
    base: tuple[int, int] = (10, 10),
) -> tuple[Axis, Axis]:
    """Axes that hold all values of x and of y, in a frame of `size`.

    `margins` are the pixels left, right and below; `texts` write the ticks. Linear ticks are round
    numbers to a `base` of 10, or of 1024. Values of a logarithmic axis are above 0.
    """
    left, right, below = margins
    width, height = size
    spans = ((left, width - right), (height - below, 10))
    made = []
    for own, label, is_log, text, radix, (start, end) in zip(
        values, labels, log, texts, base, spans, strict=True
    ):
        low, high = min(own), max(own)
        ticks = log_ticks(low, high) if is_log else linear_ticks(low, high, radix)
        shown = tuple((tick, text(tick)) for tick in ticks)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
        made.append(Axis(low, high, start, end, is_log, shown, label))
    return made[0], made[1]


def linear_ticks(low: float, high: float, base: int = 10, most: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, 2 to about `most` of them.

    Steps are 1, 2 or 5 times a power of 10, or with a `base` of 1024 a power of 2.
    """
    span = (high - low) or abs(high) or 1.0
    if base == 1024:
        step = 2.0 ** math.ceil(math.log2(span / most))
    else:
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of ten around `low` and `high`; with 2 and 5 between them where these are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if last - first <= 2:
        fine = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        start = max((i for i, t in enumerate(fine) if t <= low * (1 + 1e-9)), default=0)
        end = min(i for i, t in enumerate(fine) if t >= high * (1 - 1e-9))
        if end == start:
            end += 1
        return [float(f"{t:.12g}") for t in fine[start : end + 1]]
    stride = -(-(last - first) // most)
    return [10.0**e for e in range(first, last + stride, stride)]


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that none beats in both: for rising x, each lower in y than all before it."""
    found: list[Point] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return tuple(found)
