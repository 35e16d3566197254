"""The page about a plan: tables, plots and heat maps."""

from __future__ import annotations

import math
from typing import Any

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.report import heat_map as heat
from lfmc.report.page import render
from lfmc.report.plan_facts import PlanFacts, TensorFacts
from lfmc.report.plan_plots import curve_plot, kind_plots, ladder_plot, spectrum_plot
from lfmc.report.plot import FULL_WIDTH, Axis
from lfmc.report.tensor_labels import GROUPS
from lfmc.report.units import describe_format, percent, size


def plan_page(facts: PlanFacts) -> str:
    """Return a self-contained HTML page."""
    spectrum, curve = spectrum_plot(facts.spectra), curve_plot(facts.curves)
    maps = [heat.layer_map(facts.tensors, facts.layer_types), heat.expert_map(facts.tensors)]
    return render(
        "plan.html",
        facts=facts,
        plan=facts.plan,
        head=_head(facts),
        bars=_bars(facts),
        shades=(heat.colours(heat.LIGHT), heat.colours(heat.DARK)),
        scale=(heat.LOWEST, heat.HIGHEST),
        maps=[m for m in maps if m is not None],
        spectrum=spectrum,
        curve=curve,
        kinds=kind_plots(facts.kinds),
        ladder=ladder_plot(facts),
        ladder_wide=ladder_plot(facts, FULL_WIDTH),
        why=why_unmeasured(facts.plan),
        data=_data(facts, {"spectrum": spectrum, "curve": curve}),
    )


def why_unmeasured(plan: BitPlan) -> str:
    """Return why a plan of a method other than "auto" has no costs."""
    reasons = {
        "uniform": "it uses one format for all matrices, chosen by size",
        "none": "it does not quantize",
        "alphaq": "it weights matrices by spectrum and variance, which are not in units of KL",
    }
    reason = reasons.get(plan.method, "it uses the requested bit width")
    return (
        f"Method {plan.method} measures no costs: {reason}. "
        "A plan made with --bits auto has this section."
    )


def _head(facts: PlanFacts) -> list[tuple[str, str]]:
    plan = facts.plan
    budget = "none"
    if plan.limit_nbytes is not None:
        bits = 8 * plan.limit_nbytes / plan.num_params
        budget = f"{size(plan.limit_nbytes)}, {bits:.2f} bits per weight"
    kl = plan.predicted_kl
    return [
        ("model", f"{facts.model}, {plan.num_params:,} parameters"),
        ("target", plan.target),
        ("method", plan.method),
        ("seed", str(plan.seed)),
        ("budget", budget),
        ("size", f"{size(plan.nbytes)} ({plan.nbytes:,} bytes)"),
        ("bits per weight", f"{plan.bits_per_weight:.3f}, all stored bytes counted"),
        ("predicted KL", "not predicted" if kl is None else f"{kl:.4f} nats per token"),
        ("fingerprint", plan.fingerprint),
    ]


def _bars(facts: PlanFacts) -> list[dict[str, Any]]:
    """Return bars for groups, the graph and the unused budget; x and width are in percent."""
    plan = facts.plan
    total = max(plan.nbytes, plan.limit_nbytes or 0)
    rows: list[tuple[str, int, int | None, int, int | None]] = [
        (g.name, GROUPS.index(g.name), g.tensors, g.nbytes, g.params) for g in facts.groups
    ]
    rows.append(("graph", len(GROUPS), None, plan.graph_nbytes, None))
    if facts.unused is not None:
        rows.append(("unused", len(GROUPS) + 1, None, facts.unused, None))
    bars, offset = [], 0
    for name, colour, tensors, nbytes, params in rows:
        bars.append(
            {
                "name": name,
                "colour": f"var(--c{colour})",
                "tensors": "" if tensors is None else f"{tensors:,}",
                "nbytes": nbytes,
                "share": f"{100 * nbytes / total:.1f} %",
                "bits": "" if not params else f"{8 * nbytes / params:.2f}",
                "x": round(100 * offset / total, 3),
                "width": round(100 * nbytes / total, 3),
            }
        )
        offset += nbytes
    return bars


def _data(facts: PlanFacts, plots: dict[str, Any]) -> dict[str, Any]:
    """Return the data of the page's script.

    Every tensor has texts; tensors that the page shows in full also have numbers.
    """
    tensor_index = {t.row.name: i for i, t in enumerate(facts.tensors)}
    curves = (facts.curves or {}).values()
    formats = list(dict.fromkeys(p.format.name for curve in curves for p in curve))
    format_index = {name: i for i, name in enumerate(formats)}
    full = {}
    for name, s in facts.spectra.items():
        curve = facts.curves[name] if facts.curves is not None else ()
        full[tensor_index[name]] = {
            "shares": [_round(v) for v in s.shares],
            "tail": s.tail,
            "edge": _round(s.edge),
            "alpha": float(f"{s.alpha:.6g}") if math.isfinite(s.alpha) else None,
            "count": s.count,
            "curve": [
                [format_index[p.format.name], *map(_round, (p.bits_per_weight, p.error, p.cost))]
                for p in curve
            ],
        }
    return {
        "texts": [_texts(t, facts.alphas.get(t.row.name)) for t in facts.tensors],
        "nbytes": [t.row.nbytes for t in facts.tensors],
        "formats": formats,
        "chosen": [format_index.get(t.row.format) for t in facts.tensors],
        "ranks": {s.count: s.ranks for s in facts.spectra.values()},
        "full": full,
        "first": _initial_tensor(facts, tensor_index),
        "frames": {
            name: {"x": _axis(plot.x), "y": _axis(plot.y)}
            for name, plot in plots.items()
            if plot is not None
        },
    }


def _initial_tensor(facts: PlanFacts, tensor_index: dict[str, int]) -> int | None:
    """Return the matrix that the page selects first: the one with the heaviest tail."""
    if not facts.spectra:
        return None
    return tensor_index[min(facts.spectra, key=lambda name: facts.spectra[name].alpha)]


def _texts(tensor: TensorFacts, alpha: float | None) -> list[str]:
    """Return the lines of a tensor's tooltip; the first line is its name."""
    row = tensor.row
    shape = " x ".join(map(str, row.shape))
    lines = [
        row.name,
        f"{describe_format(tensor.format)}; {shape}",
        f"{size(row.nbytes)} ({row.nbytes:,} bytes), {tensor.bits_per_weight:.2f} bits per weight",
    ]
    if isinstance(tensor.format, Format):
        lines.append(f"predicted squared error: {percent(row.error)} of the squared weights")
    if alpha is not None:
        lines.append(f"alpha {alpha:.3f}" if math.isfinite(alpha) else "no tail in the spectrum")
    return [*lines, row.reason]


def _axis(axis: Axis) -> list[float]:
    return [axis.low, axis.high, axis.start, axis.end, int(axis.log)]


def _round(value: float) -> float:
    """Round to three significant digits, which keeps the page small."""
    return float(f"{value:.3g}")
