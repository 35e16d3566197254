"""`lfmc diff`: compare two bundles or plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lfmc.commands.options import json_option
from lfmc.commands.param_types import PATH, Model
from lfmc.commands.progress import progress_options, start_progress

if TYPE_CHECKING:
    from lfmc.exporter.diff import ChangedTensor, Difference

MAX_NAMES = 8  # tensors of one kind that are listed by name
MAX_LINES = 24  # lines about tensors


@click.command("diff")
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option(
    "--activations",
    "model",
    type=Model(),
    metavar="MODEL",
    help="Also run the weights of both plans on text and find the first layer whose activations "
    "differ. MODEL is the checkpoint of the plans, or demo for the test model.",
)
@click.option(
    "--apart",
    type=float,
    help="With --activations: report a layer if its activations differ by more than this, relative "
    "to the float32 activations. [default: 0.05, that is 5 %]",
)
@progress_options
@json_option
def command(
    first: Path,
    second: Path,
    model: str | None,
    apart: float | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Compare FIRST with SECOND; each is a bundle or a plan.json.

    Shows tensors with different formats, sizes, measured quality, options and versions. The exit
    code is 0 if the comparison was possible, whatever the differences.
    """
    progress = start_progress("diff", quiet=quiet, verbose=verbose)
    with progress.stage("load"):
        from lfmc.checkpoint.checkpoint import open_checkpoint
        from lfmc.errors import InputError
        from lfmc.exporter.diff import (
            STREAM_TOLERANCE,
            compare_activations,
            compare_plans,
            open_diff_input,
        )
    tolerance = STREAM_TOLERANCE if apart is None else apart
    if not 0 <= tolerance < float("inf"):
        raise InputError("--apart is out of range", expected="0 or more", got=tolerance)
    inputs = open_diff_input(first), open_diff_input(second)
    difference = compare_plans(*inputs, tolerance)
    if model is not None:
        checkpoint = open_checkpoint(None if model == "demo" else model)
        progress.expect(1)
        with progress.stage("activations"):
            difference = compare_activations(difference, *inputs, checkpoint, progress)
    if as_json:
        click.echo(json.dumps(difference.to_dict()))
    else:
        click.echo("\n".join(_lines(difference)))


def _lines(difference: Difference) -> list[str]:
    lines = [f"tensors stored differently: {len(difference.changed)} of {difference.tensors}"]
    lines += _tensor_lines(difference.changed)
    for name, (first, second) in difference.numbers.items():
        if first is None and second is None:
            continue
        change = "" if first is None or second is None else f"  {second - first:+,.6g}"
        lines.append(f"{name:<18}{_number(first):>16}{_number(second):>16}{change}")
    lines += [f"{name}: {first} -> {second}" for name, (first, second) in difference.facts.items()]
    if not difference.changed and not difference.facts:
        lines.append("formats, options and versions are equal")
    if difference.streams:
        lines.append(
            f"{'activations after':<20}{'first vs second':>18}{'first vs float32':>18}"
            f"{'second vs float32':>19}"
        )
        lines += [
            f"{stream.part:<20}{stream.between:>18.2%}{stream.first:>18.2%}{stream.second:>19.2%}"
            for stream in difference.streams
        ]
        part = difference.diverges_at
        place = "nowhere" if part is None else f"first after {part}"
        lines.append(f"activations differ by more than {difference.apart:.2%}: {place}")
    return lines


def _tensor_lines(changed: tuple[ChangedTensor, ...]) -> list[str]:
    """Return a line per group and change of format, with tensor names if there are few."""
    tensors_by_change: dict[tuple[str, str, str], list[ChangedTensor]] = {}
    for tensor in changed:
        key = tensor.group, tensor.first or "absent", tensor.second or "absent"
        tensors_by_change.setdefault(key, []).append(tensor)
    lines = []
    for (group, first, second), tensors in tensors_by_change.items():
        nbytes = sum(tensor.nbytes for tensor in tensors)
        lines.append(f"  {group}: {len(tensors)} x {first} -> {second}, {nbytes:+,} bytes")
        if len(tensors) <= MAX_NAMES:
            lines += [f"    {tensor.name}" for tensor in tensors]
    omitted = len(lines) - MAX_LINES
    if omitted <= 1:
        return lines
    return [*lines[:MAX_LINES], f"  and {omitted} more lines (--json lists all tensors)"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
