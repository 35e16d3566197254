"""Tables on the terminal: plans, parity results and memory."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.commands.fitted_table import FittedTable
from lfmc.report.tensor_labels import group
from lfmc.report.units import MIB

if TYPE_CHECKING:
    from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
    from lfmc.checkpoint.footprint import Footprint
    from lfmc.exporter.export import Report
    from lfmc.parity.compare import Rung
    from lfmc.parity.text_quality import Quality

BAR_LENGTH = 24  # characters of the longest bar


class StdoutConsole(Console):
    """A console whose closed pipe is an exception, as it is for `click.echo`."""

    def on_broken_pipe(self) -> None:
        """Raise `BrokenPipeError`: `lfmc.cli` ends the command."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads stdout")


def console() -> Console:
    """Return a console on stdout, as wide as the terminal, or 100 columns in a pipe."""
    terminal = StdoutConsole(highlight=False, markup=False)
    if terminal.is_terminal:
        return terminal
    return StdoutConsole(highlight=False, markup=False, width=100)


def plan_table(plan: BitPlan, measured: Mapping[str, float], results: str = "") -> FittedTable:
    """Return a table of tensor groups: bit widths, sizes, and errors against the checkpoint.

    An error is the sum of squared errors over the sum of squared weights, in percent. Predicted
    errors come from the plan; measured errors are of the codes that were read back from the
    artifact. `results` is the caption below the table.
    """
    table = Table(
        title=f"plan: {plan.method}",
        title_justify="left",
        caption=results or None,
        caption_justify="left",
        caption_style="",
    )
    errors = "predicted\nerror", "measured\nerror"
    for name in ("tensors", "count", "bits x tensors", "MiB", *errors):
        is_text = name in ("tensors", "bits x tensors")
        table.add_column(name, justify="left" if is_text else "right")
    groups: dict[str, list[PlanRow]] = {}
    for row in plan.rows:
        groups.setdefault(group(row.name, row.role), []).append(row)
    for name, rows in groups.items():
        measured_errors = [measured[r.name] for r in rows if r.name in measured]
        quantized = [r for r in rows if isinstance(parse_format(r.format), Format)]
        table.add_row(
            name,
            str(len(rows)),
            _widths(rows),
            f"{sum(r.nbytes for r in rows) / MIB:.3f}",
            _percent([r.error for r in quantized]) if quantized else "-",
            _percent(measured_errors) if measured_errors else "-",
        )
    table.add_row("graph", "", "", f"{plan.graph_nbytes / MIB:.3f}", "-", "-")
    limit = "" if plan.limit_nbytes is None else f" of {plan.limit_nbytes / MIB:.3f}"
    total = f"{plan.nbytes / MIB:.3f}{limit}"
    table.add_row(
        "total", str(len(plan.rows)), f"{plan.bits_per_weight:.3f} bits per weight", total
    )
    return FittedTable(table, ("count", errors[0]))


def parity_table(rungs: Sequence[Rung]) -> FittedTable:
    """Return a table with the worst case of each rung."""
    table = Table(title="parity", title_justify="left")
    for name in ("rung", "comparison", "worst case", "difference", "allowed", ""):
        table.add_column(name, justify="right" if name in ("difference", "allowed") else "left")
    for rung in rungs:
        if rung.skipped is not None:
            table.add_row(str(rung.number), rung.title, rung.skipped, "-", "-", "skipped")
            continue
        worst = max(rung.cases, key=lambda case: case.difference)
        allowed = "-" if rung.tolerance is None else _number(rung.tolerance, 0)
        verdict = "reported" if rung.tolerance is None else "ok" if rung.passed else "FAILED"
        difference = _number(worst.difference, 1)
        tokens_after_tie = sum(case.apart for case in rung.cases)
        if tokens_after_tie:
            largest = max(case.difference_apart for case in rung.cases)
            difference += f"\n{tokens_after_tie} tokens after a near tie of experts: {largest:.1e}"
        table.add_row(str(rung.number), rung.title, worst.case, difference, allowed, verdict)
    return FittedTable(table, ("worst case", "rung"))


def _number(value: float, digits: int) -> str:
    """Format a value below 0.01 in scientific notation, others (ratios, steps) as decimals."""
    return f"{value:.{digits}e}" if 0 < value < 0.01 else f"{value:.3g}"


def result_lines(report: Report, quality: Quality | None, text: Path | None = None) -> str:
    """Return the last lines of an export: quality on `text` (None: the bundled text) and size."""
    source = "public-domain text" if text is None else text.name
    lines = ["parity: not checked (--check off); this artifact is not verified"]
    if report.verification is not None:
        lines = ["parity: the artifact was not executed on this machine, only read back from disk"]
    if quality is not None:
        lines = [
            f"parity 4, on {quality.tokens} tokens of {source}: KL {quality.kl:.4f} nats "
            f"per token, top-1 {100 * quality.top1:.1f} %,",
            f"perplexity {quality.perplexity:.2f} (float32: {quality.reference_perplexity:.2f})",
        ]
    plan = report.plan
    budget = "no budget" if plan.limit_nbytes is None else f"budget {plan.limit_nbytes:,}"
    lines.append(
        f"size on disk: {report.nbytes:,} bytes (plan {plan.nbytes:,}, {budget}), "
        f"{8 * report.nbytes / plan.num_params:.3f} bits per weight"
    )
    return "\n".join(lines)


def memory_table(footprints: Sequence[Footprint]) -> FittedTable:
    """Return a table of memory by context, with a bar chart of the total and the estimate."""
    chart = "# total  . estimate"
    table = Table(
        title="memory by context, MiB (weights as stored, states in float32)",
        title_justify="left",
        caption="estimate: a model of this depth and size with full attention in every layer",
        caption_justify="left",
    )
    for name in ("context", "weights", "KV cache", "conv states", "total", "estimate"):
        table.add_column(name, justify="right")
    table.add_column(chart, no_wrap=True)
    largest = max(max(f.total, f.all_attention_total) for f in footprints)
    for f in footprints:
        sizes = (f.weights, f.attention, f.conv, f.total, f.all_attention_total)
        total, estimate = (
            round(BAR_LENGTH * n / largest) for n in (f.total, f.all_attention_total)
        )
        bar = "#" * total + "." * (estimate - total)
        table.add_row(f"{f.context:,}", *(f"{n / MIB:.2f}" for n in sizes), bar)
    return FittedTable(table, (chart, "conv states", "KV cache"))


def _widths(rows: Sequence[PlanRow]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        stored = parse_format(row.format)
        key = str(stored.bits) if isinstance(stored, Format) else stored.dtype
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{width} x {count}" for width, count in sorted(counts.items()))


def _percent(errors: Sequence[float]) -> str:
    return f"{100 * sum(errors) / len(errors):.3f} %"
