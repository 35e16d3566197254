"""`lfmc diff`: two bundles or plans side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lfmc.commands.options import json_option

if TYPE_CHECKING:
    from lfmc.exporter.diff import Changed, Difference

FEW = 8  # tensors of a kind that are named one by one
SHOWN = 24  # lines of tensors


@click.command("diff")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--activations",
    "model",
    help="Run both plans' weights on text, and say where they part. [MODEL, or demo]",
)
@click.option(
    "--apart",
    type=float,
    help="Streams part where they are this far from each other. [default: 0.05 of their size]",
)
@json_option
def command(
    first: Path, second: Path, model: str | None, apart: float | None, as_json: bool
) -> None:
    """Compare FIRST with SECOND: bundles, or plan.json files, in any mix.

    Shows how tensors are stored otherwise, sizes, measured quality, options and versions. The exit
    code is 0 wherever they could be compared, however much they differ.
    """
    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.errors import InputError
    from lfmc.exporter.diff import APART, difference, open_side, with_activations
    from lfmc.machine.progress import for_terminal

    share = APART if apart is None else apart
    if not 0 <= share < float("inf"):
        raise InputError("--apart is out of range", expected="0 or more", got=share)
    sides = open_side(first), open_side(second)
    found = difference(*sides, share)
    if model is not None:
        checkpoint = open_checkpoint(None if model == "demo" else model)
        progress = for_terminal()
        with progress.stage("activations"):
            found = with_activations(found, *sides, checkpoint, progress)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        click.echo("\n".join(_lines(found)))


def _lines(found: Difference) -> list[str]:
    lines = [f"tensors stored otherwise: {len(found.changed)} of {found.tensors}"]
    lines += _tensors(found.changed)
    for name, (a, b) in found.numbers.items():
        if a is None and b is None:
            continue
        more = "" if a is None or b is None else f"  {b - a:+,.6g}"
        lines.append(f"{name:<18}{_number(a):>16}{_number(b):>16}{more}")
    lines += [f"{name}: {a} -> {b}" for name, (a, b) in found.facts.items()]
    if not found.changed and not found.facts:
        lines.append("made alike: same formats, options and versions")
    if found.streams:
        lines.append(f"{'activations behind':<20}{'between':>10}{'first':>10}{'second':>10}")
        lines += [
            f"{own.part:<20}{own.between:>10.2%}{own.first:>10.2%}{own.second:>10.2%}"
            for own in found.streams
        ]
        part = found.parts_at
        place = "nowhere" if part is None else f"first behind {part}"
        lines.append(f"they part by more than {found.apart:.2%} {place}")
    return lines


def _tensors(changed: tuple[Changed, ...]) -> list[str]:
    """Tensors that change alike on one line, those of a kind with few by name."""
    kinds: dict[tuple[str, str, str], list[Changed]] = {}
    for own in changed:
        key = own.group, own.first or "no such tensor", own.second or "no such tensor"
        kinds.setdefault(key, []).append(own)
    lines = []
    for (group, first, second), members in kinds.items():
        nbytes = sum(own.nbytes for own in members)
        lines.append(f"  {group}: {len(members)} x {first} -> {second}, {nbytes:+,} bytes")
        if len(members) <= FEW:
            lines += [f"    {own.name}" for own in members]
    left = len(lines) - SHOWN
    return lines if left <= 1 else [*lines[:SHOWN], f"  and {left} lines more (--json has all)"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
