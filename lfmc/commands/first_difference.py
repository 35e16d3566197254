"""Print where the exported model first differs from the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import click

from lfmc.errors import GateError

if TYPE_CHECKING:
    from lfmc.parity.place import Corner, Place

MAX_NAMES = 3  # names in one line


@contextmanager
def showing_place(as_json: bool) -> Iterator[None]:
    """Print the place of a `GateError`, if it has one. JSON output contains the place already."""
    try:
        yield
    except GateError as error:
        if error.place is not None and not as_json:
            click.echo(place_text(cast("Place", error.place)))
        raise


def place_text(place: Place) -> str:
    """Return lines with the operator that differs, the difference, its case and both tensors."""
    lines = [f"first difference: {place.where}"]
    if place.weights and place.weights != (place.name,):
        lines.append(f"  reads       {_names(place.weights)}")
    allowed = f" (allowed {place.tolerance:.1e})" if place.tolerance else ""
    lines.append(f"  difference  {place.difference:.3g} of the largest value{allowed}")
    if place.case is not None:
        token = "" if place.token is None else f", from token {place.token}"
        call = "" if place.call is None else f", call {place.call + 1}"
        lines.append(f"  in          {place.case}{call}{token}")
    if place.agrees is not None:
        lines.append(f"  agrees      up to {place.agrees}")
    if place.hidden:
        names = _names(place.hidden)
        lines.append(f"  not checked {names}: the target can't output these values")
    if place.note is not None:
        lines.append(f"  note        {place.note}")
    if place.corner is not None:
        lines += _corner_lines(place.corner)
    return "\n".join(lines)


def _corner_lines(corner: Corner) -> list[str]:
    rows = f"rows {corner.row} to {corner.row + len(corner.ours) - 1}"
    columns = f"columns {corner.column} to {corner.column + len(corner.ours[0]) - 1}"
    lines = []
    for name, values in (("artifact", corner.ours), ("reference", corner.reference)):
        lines.append(f"  {name}, {rows}, {columns}")
        lines += ["    " + " ".join(f"{value:>10.4g}" for value in row) for row in values]
    return lines


def _names(names: tuple[str, ...]) -> str:
    listed = ", ".join(names[:MAX_NAMES])
    return listed if len(names) <= MAX_NAMES else f"{listed} and {len(names) - MAX_NAMES} more"
