"""Showing the first place that differs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import click

from lfmc.errors import GateError

if TYPE_CHECKING:
    from lfmc.parity.place import Corner, Place

MOST = 3  # names in a row


@contextmanager
def showing_place(as_json: bool) -> Iterator[None]:
    """Print the place of a `GateError` that knows it, unless JSON is asked for: that has it all."""
    try:
        yield
    except GateError as error:
        if error.place is not None and not as_json:
            click.echo(place_text(cast("Place", error.place)))
        raise


def place_text(place: Place) -> str:
    """Lines for people: what differs, by how much, where in the case, and both tensors."""
    lines = [f"first place that differs: {place.where}"]
    if place.weights and place.weights != (place.name,):
        lines.append(f"  reads       {_several(place.weights)}")
    allowed = f" (allowed {place.tolerance:.1e})" if place.tolerance else ""
    lines.append(f"  difference  {place.difference:.3g} of the largest value{allowed}")
    if place.case is not None:
        at = "" if place.token is None else f", from token {place.token}"
        call = "" if place.call is None else f", call {place.call + 1}"
        lines.append(f"  in          {place.case}{call}{at}")
    if place.agrees is not None:
        lines.append(f"  agrees      up to {place.agrees}")
    if place.hidden:
        lines.append(f"  not shown   {_several(place.hidden)}: the target has no form to show it")
    if place.note is not None:
        lines.append(f"  note        {place.note}")
    if place.corner is not None:
        lines += _corner(place.corner)
    return "\n".join(lines)


def _corner(corner: Corner) -> list[str]:
    rows = f"rows {corner.row} to {corner.row + len(corner.ours) - 1}"
    columns = f"columns {corner.column} to {corner.column + len(corner.ours[0]) - 1}"
    lines = []
    for name, values in (("artifact", corner.ours), ("reference", corner.reference)):
        lines.append(f"  {name}, {rows}, {columns}")
        lines += ["    " + " ".join(f"{value:>10.4g}" for value in row) for row in values]
    return lines


def _several(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:MOST])
    return shown if len(names) <= MOST else f"{shown} and {len(names) - MOST} more"
