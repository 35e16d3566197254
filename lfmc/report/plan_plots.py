"""The plots of a plan's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lfmc.calib_free.auto.budget_ladder import Step
from lfmc.report.plan_facts import CurvePoint, KindCurve, PlanFacts
from lfmc.report.plot import Line, Mark, Plot, Point, axes, front, plain, stairs
from lfmc.report.spectrum_facts import Spectrum
from lfmc.report.units import percent, size

WIDE, SMALL = (460, 300), (230, 170)
LEAST_SHARE = 1e-6  # of the largest eigenvalue: what is below is not drawn
MOST_SHARE = 10.0  # where a fitted tail starts at most: it may miss the largest by far
LEAST_ERROR = 1e-7
BITS = "bits per weight, scales included"


def ladder_plot(facts: PlanFacts) -> Plot | None:
    """Predicted KL by size, for `auto` and for one format everywhere, and where this plan is.

    None where nothing was measured, or no format costs anything (a model of zeros).
    """
    steps = facts.ladder
    if steps is None:
        return None
    plan, params = facts.plan, facts.plan.num_params

    def points(line: Sequence[Step]) -> tuple[Point, ...]:
        return tuple((8 * s.nbytes / params, s.kl) for s in line if s.kl > 0)

    auto, uniform = points(steps.auto), points(steps.uniform)
    here = (plan.bits_per_weight, plan.predicted_kl or 0.0)
    every = [*auto, *uniform, *([here] if here[1] > 0 else [])]
    if not every:
        return None
    x, y = axes(
        ([p[0] for p in every], [p[1] for p in every]),
        (BITS, "predicted KL, nats per token"),
        size=WIDE,
        log=(False, True),
    )
    marks = [
        Mark((8 * s.nbytes / params, s.kl), 3, look, f"{name}: {size(s.nbytes)}, KL {s.kl:.4g}")
        for name, look, line in (("auto", "one", steps.auto), ("uniform", "two", steps.uniform))
        for s in line
        if s.kl > 0
    ]
    if here[1] > 0:
        title = f"this plan: {size(plan.nbytes)}, {here[0]:.3f} bits per weight, KL {here[1]:.4g}"
        label = "this plan, fitted" if plan.fitted_names else "this plan"
        marks.append(Mark(here, 7, "here", title, label))
    both = (Line(stairs(uniform), "two", "uniform"), Line(auto, "one", "auto"))
    lines = tuple(line for line in both if len(line.points) > 1)
    title = "Predicted KL against bits per weight"
    return Plot(title, *WIDE, x, y, lines, tuple(marks), "ladder")


def kind_plots(kinds: Sequence[KindCurve] | None) -> list[Plot]:
    """A small plot a kind, all with the same axes: mean error by bits per weight."""
    if not kinds:
        return []
    every = [(p.bits_per_weight, max(p.error, LEAST_ERROR)) for k in kinds for p in k.points]
    x, y = axes(
        ([p[0] for p in every], [p[1] for p in every]),
        ("bits per weight", "mean error"),
        size=SMALL,
        log=(False, True),
        texts=(plain, percent),
    )
    plots = []
    for kind in kinds:
        count = sum(kind.chosen.values())
        marks = [_format_mark(p, 1.8, "other", p.format.name) for p in kind.points]
        for point in kind.points:
            taken = kind.chosen.get(point.format, 0)
            if taken:
                radius = 3.5 + 4 * (taken / count) ** 0.5
                title = f"{point.format.name}: chosen for {taken} of {count}"
                marks.append(_format_mark(point, radius, "here", title))
        line = Line(_front(kind.points), "one", "the least error for its bits")
        plots.append(Plot(kind.kind, *SMALL, x, y, (line,), tuple(marks)))
    return plots


def curve_plot(curves: Mapping[str, Sequence[CurvePoint]] | None) -> Plot | None:
    """An empty frame that holds the error curve of any tensor; None where there are no curves."""
    points = [p for curve in (curves or {}).values() for p in curve]
    if not points:
        return None
    x, y = axes(
        ([p.bits_per_weight for p in points], [max(p.error, LEAST_ERROR) for p in points]),
        (BITS, "error, share of the energy"),
        size=WIDE,
        log=(False, True),
        texts=(plain, percent),
    )
    return Plot("Error of the chosen tensor in every format", *WIDE, x, y, name="curve")


def spectrum_plot(spectra: Mapping[str, Spectrum]) -> Plot | None:
    """An empty frame that holds any of the spectra; None where there are none."""
    if not spectra:
        return None
    shares = [v for s in spectra.values() for v in s.shares]
    counts = [s.count for s in spectra.values()]
    fitted = [min(max(s.fitted, LEAST_SHARE), MOST_SHARE) for s in spectra.values()]
    x, y = axes(
        ([1.0, *counts], [1.0, max(min(shares), LEAST_SHARE), *fitted]),
        ("rank of the eigenvalue", "eigenvalue, largest = 1"),
        size=WIDE,
        log=(True, True),
        pad=(0.0, 0.04),
    )
    return Plot("Eigenvalues of the chosen tensor by rank", *WIDE, x, y, name="spectrum")


def _format_mark(point: CurvePoint, radius: float, look: str, title: str) -> Mark:
    at = (point.bits_per_weight, max(point.error, LEAST_ERROR))
    words = f"{title}; {at[0]:.2f} bits per weight, error {percent(point.error)}"
    return Mark(at, radius, look, words)


def _front(points: Sequence[CurvePoint]) -> tuple[Point, ...]:
    return front((p.bits_per_weight, max(p.error, LEAST_ERROR)) for p in points)
