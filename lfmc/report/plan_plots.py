"""The plots on a plan's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lfmc.calib_free.auto.budget_ladder import Step
from lfmc.report.plan_facts import CurvePoint, KindCurve, PlanFacts
from lfmc.report.plot import (
    HALF_WIDTH,
    Line,
    Mark,
    Plot,
    Point,
    axes,
    format_tick,
    pareto_front,
    stairs,
)
from lfmc.report.spectrum_facts import Spectrum
from lfmc.report.units import percent, size

SMALL = (230, 170)
MIN_SHARE = 1e-6  # of the largest eigenvalue: smaller eigenvalues are not drawn
MAX_SHARE = 10.0  # upper limit of a fitted tail, which may be far above the largest eigenvalue
MIN_ERROR = 1e-7
BITS_LABEL = "bits per weight, scales included"


def ladder_plot(facts: PlanFacts, frame: tuple[int, int] = HALF_WIDTH) -> Plot | None:
    """Plot predicted KL by size for `auto` and `uniform`, and mark this plan.

    Returns None if no costs were measured, or if all costs are zero (a model of zeros).
    """
    ladder = facts.ladder
    if ladder is None:
        return None
    plan, params = facts.plan, facts.plan.num_params

    def points(line: Sequence[Step]) -> tuple[Point, ...]:
        return tuple((8 * s.nbytes / params, s.kl) for s in line if s.kl > 0)

    auto, uniform = points(ladder.auto), points(ladder.uniform)
    plan_point = (plan.bits_per_weight, plan.predicted_kl or 0.0)
    all_points = [*auto, *uniform, *([plan_point] if plan_point[1] > 0 else [])]
    if not all_points:
        return None
    x, y = axes(
        ([p[0] for p in all_points], [p[1] for p in all_points]),
        (BITS_LABEL, "predicted KL, nats per token"),
        size=frame,
        log=(False, True),
    )
    marks = [
        Mark((8 * s.nbytes / params, s.kl), 3, style, f"{name}: {size(s.nbytes)}, KL {s.kl:.4g}")
        for name, style, steps in (("auto", "one", ladder.auto), ("uniform", "two", ladder.uniform))
        for s in steps
        if s.kl > 0
    ]
    bits, kl = plan_point
    if kl > 0:
        title = f"this plan: {size(plan.nbytes)}, {bits:.3f} bits per weight, KL {kl:.4g}"
        label = "this plan, fine-tuned" if plan.fitted_names else "this plan"
        marks.append(Mark(plan_point, 7, "here", title, label))
    candidates = (Line(stairs(uniform), "two", "uniform"), Line(auto, "one", "auto"))
    lines = tuple(line for line in candidates if len(line.points) > 1)
    title = "Predicted KL against bits per weight"
    return Plot(title, *frame, x, y, lines, tuple(marks))


def kind_plots(kinds: Sequence[KindCurve] | None) -> list[Plot]:
    """Return a small plot per kind, all with the same axes: mean error by bits per weight."""
    if not kinds:
        return []
    all_points = [_position(point) for kind in kinds for point in kind.points]
    x, y = axes(
        ([p[0] for p in all_points], [p[1] for p in all_points]),
        ("bits per weight", "mean error"),
        size=SMALL,
        log=(False, True),
        formats=(format_tick, percent),
    )
    plots = []
    for kind in kinds:
        total = sum(kind.counts.values())
        marks = [_format_mark(p, 1.8, "other", p.format.name) for p in kind.points]
        for point in kind.points:
            count = kind.counts.get(point.format, 0)
            if count:
                radius = 3.5 + 4 * (count / total) ** 0.5
                title = f"{point.format.name}: chosen for {count} of {total}"
                marks.append(_format_mark(point, radius, "here", title))
        line = Line(pareto_front(map(_position, kind.points)), "one", "smallest error at its size")
        plots.append(Plot(kind.kind, *SMALL, x, y, (line,), tuple(marks)))
    return plots


def curve_plot(curves: Mapping[str, Sequence[CurvePoint]] | None) -> Plot | None:
    """Return an empty frame for the error curve of any tensor; None without curves."""
    points = [p for curve in (curves or {}).values() for p in curve]
    if not points:
        return None
    x, y = axes(
        ([p.bits_per_weight for p in points], [max(p.error, MIN_ERROR) for p in points]),
        (BITS_LABEL, "relative squared error"),
        size=HALF_WIDTH,
        log=(False, True),
        formats=(format_tick, percent),
    )
    return Plot("Error of the selected tensor in every format", *HALF_WIDTH, x, y, name="curve")


def spectrum_plot(spectra: Mapping[str, Spectrum]) -> Plot | None:
    """Return an empty frame for the spectrum of any tensor; None without spectra."""
    if not spectra:
        return None
    shares = [v for s in spectra.values() for v in s.shares]
    counts = [s.count for s in spectra.values()]
    tail_tops = [min(max(s.tail_top, MIN_SHARE), MAX_SHARE) for s in spectra.values()]
    x, y = axes(
        ([1.0, *counts], [1.0, max(min(shares), MIN_SHARE), *tail_tops]),
        ("rank of the eigenvalue", "eigenvalue, largest = 1"),
        size=HALF_WIDTH,
        log=(True, True),
        pad=(0.0, 0.04),
    )
    return Plot("Eigenvalues of the selected tensor by rank", *HALF_WIDTH, x, y, name="spectrum")


def _format_mark(point: CurvePoint, radius: float, style: str, title: str) -> Mark:
    bits = f"{point.bits_per_weight:.2f} bits per weight"
    text = f"{title}; {bits}, error {percent(point.error)}"
    return Mark(_position(point), radius, style, text)


def _position(point: CurvePoint) -> Point:
    return (point.bits_per_weight, max(point.error, MIN_ERROR))
