"""Tables for people: groups of a plan, rungs of parity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.checkpoint.footprint import Footprint
from lfmc.exporter.export import Report
from lfmc.parity.compare import Rung
from lfmc.parity.text_quality import Quality
from lfmc.report.tensor_labels import group
from lfmc.report.units import MIB

BAR = 24  # characters of the longest bar


def console() -> Console:
    """Stdout, as wide as the terminal, or 100 columns in a pipe."""
    out = Console(highlight=False, markup=False)
    return out if out.is_terminal else Console(highlight=False, markup=False, width=100)


def plan_table(plan: BitPlan, measured: Mapping[str, float], results: str = "") -> Table:
    """Tensors by group: how many of which width, bytes, and error against the checkpoint.

    Errors are squared errors over the weights' energy, in percent; measured ones are of the codes
    that were read back from the artifact. `results` are lines to end with.
    """
    table = Table(
        title=f"plan: {plan.method}",
        title_justify="left",
        caption=results or None,
        caption_justify="left",
        caption_style="",
    )
    for name in ("tensors", "count", "widths (bits x tensors)", "MiB", "predicted", "measured"):
        table.add_column(
            name, justify="left" if name in ("tensors", "widths (bits x tensors)") else "right"
        )
    groups: dict[str, list[PlanRow]] = {}
    for row in plan.rows:
        groups.setdefault(group(row.name, row.role), []).append(row)
    for name, rows in groups.items():
        known = [measured[r.name] for r in rows if r.name in measured]
        quantized = [r for r in rows if isinstance(parse_format(r.format), Format)]
        table.add_row(
            name,
            str(len(rows)),
            _widths(rows),
            f"{sum(r.nbytes for r in rows) / MIB:.3f}",
            _percent([r.error for r in quantized]) if quantized else "-",
            _percent(known) if known else "-",
        )
    table.add_row("graph", "", "", f"{plan.graph_nbytes / MIB:.3f}", "-", "-")
    limit = "" if plan.limit_nbytes is None else f" of {plan.limit_nbytes / MIB:.3f}"
    total = f"{plan.nbytes / MIB:.3f}{limit}"
    table.add_row("total", str(len(plan.rows)), f"{plan.bits_per_weight:.3f} a weight", total)
    return table


def parity_table(rungs: Sequence[Rung]) -> Table:
    """Each rung's worst case."""
    table = Table(title="parity", title_justify="left")
    for name in ("rung", "what is compared", "worst case", "difference", "allowed", ""):
        table.add_column(name, justify="right" if name in ("difference", "allowed") else "left")
    for rung in rungs:
        if rung.skipped is not None:
            table.add_row(str(rung.number), rung.title, rung.skipped, "-", "-", "skipped")
            continue
        worst = max(rung.cases, key=lambda case: case.difference)
        allowed = "-" if rung.tolerance is None else _number(rung.tolerance, 0)
        verdict = "reported" if rung.tolerance is None else "ok" if rung.passed else "FAILED"
        difference = _number(worst.difference, 1)
        apart = sum(case.apart for case in rung.cases)
        if apart:
            most = max(case.difference_apart for case in rung.cases)
            difference += f"\n{apart} tokens behind a near tie of experts: {most:.1e}"
        table.add_row(str(rung.number), rung.title, worst.case, difference, allowed, verdict)
    return table


def _number(value: float, digits: int) -> str:
    """A small number by its size; one that counts steps, or is a ratio, plainly."""
    return f"{value:.{digits}e}" if 0 < value < 0.01 else f"{value:.3g}"


def result_lines(report: Report, quality: Quality | None, text: Path | None = None) -> str:
    """What ends an export: rung 4 (on a text of the user's own), and the size on disk against plan
    and budget."""
    judged = "public-domain text" if text is None else text.name
    lines = ["parity: not checked (--check off); nothing about this artifact is proven"]
    if report.verification is not None:
        lines = ["parity: the artifact was not executed on this machine, only read back from disk"]
    if quality is not None:
        lines = [
            f"parity 4, on {quality.tokens} tokens of {judged}: KL {quality.kl:.4f} nats "
            f"a token, top-1 {100 * quality.top1:.1f} %,",
            f"perplexity {quality.perplexity:.2f} (float32: {quality.reference_perplexity:.2f})",
        ]
    plan = report.plan
    budget = "no budget" if plan.limit_nbytes is None else f"budget {plan.limit_nbytes:,}"
    lines.append(
        f"size on disk: {report.nbytes:,} bytes (plan {plan.nbytes:,}, {budget}), "
        f"{8 * report.nbytes / plan.num_params:.3f} bits per weight"
    )
    return "\n".join(lines)


def memory_table(found: Sequence[Footprint]) -> Table:
    """Memory by context, with a bar of it against attention in every layer."""
    table = Table(
        title="memory by context, MiB (weights as stored, states in float32)",
        title_justify="left",
        caption="estimate: the same depth, weights and heads, with full attention in every layer",
        caption_justify="left",
    )
    for name in ("context", "weights", "keys, values", "conv states", "total", "estimate"):
        table.add_column(name, justify="right")
    table.add_column("# total  . estimate", no_wrap=True)
    largest = max(max(f.total, f.all_attention_total) for f in found)
    for f in found:
        sizes = (f.weights, f.attention, f.conv, f.total, f.all_attention_total)
        filled, estimated = (round(BAR * n / largest) for n in (f.total, f.all_attention_total))
        bar = "#" * filled + "." * (estimated - filled)
        table.add_row(f"{f.context:,}", *(f"{n / MIB:.2f}" for n in sizes), bar)
    return table


def _widths(rows: Sequence[PlanRow]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        stored = parse_format(row.format)
        key = str(stored.bits) if isinstance(stored, Format) else stored.dtype
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{width} x {count}" for width, count in sorted(counts.items()))


def _percent(errors: Sequence[float]) -> str:
    return f"{100 * sum(errors) / len(errors):.3f} %"
