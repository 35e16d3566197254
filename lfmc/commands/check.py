"""`lfmc check`: a team's matrix of exports, proven again."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lfmc.commands.options import json_option

if TYPE_CHECKING:
    from rich.table import Table

    from lfmc.check.baseline import Known
    from lfmc.check.cells import Outcome


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path), default=Path(".lfmc.toml"))
@click.option("--only", multiple=True, metavar="CELL", help="This cell alone. Repeatable.")
@click.option("--accept", is_flag=True, help="Write what is found to the baseline.")
@click.option("--fresh", is_flag=True, help="Export every cell anew, changed or not.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Folder for check.json, junit.xml and summary.md.",
)
@json_option
def command(
    file: Path,
    only: tuple[str, ...],
    accept: bool,
    fresh: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Export and verify every cell of FILE (.lfmc.toml), and compare with the baseline.

    A cell that did not change is not exported again: its bundle is kept in lfmc's cache, and only
    its files and golden prompts are proven. Exits with 3 where parity, a gate or the baseline is
    not met, with 4 where no cell at all could be executed here.

    \b
    lfmc init                      # writes .lfmc.toml
    lfmc check --accept            # writes lfmc-baseline.json: commit both
    lfmc check --report out/check  # in continuous integration
    """
    from lfmc.check.baseline import load_baseline
    from lfmc.check.config import load_matrix
    from lfmc.check.matrix import exit_code, run_matrix
    from lfmc.check.report import to_dict, write_reports
    from lfmc.commands.export import command as export_command
    from lfmc.commands.tables import console

    matrix = load_matrix(file, export_command)
    known = load_baseline(matrix.baseline)
    outcomes = run_matrix(
        matrix,
        only=only,
        fresh=fresh,
        accept=accept,
        observe=lambda cell: click.echo(f"{cell.name} ...", err=True),
    )
    if report is not None:
        write_reports(report, outcomes, known)
    if as_json:
        click.echo(json.dumps(to_dict(outcomes)))
    else:
        console().print(_table(outcomes, known))
        for own in outcomes:
            for reason in own.reasons:
                click.echo(f"{own.cell.name}: {own.status}: {reason}")
        if accept:
            click.echo(f"baseline: {matrix.baseline}")
    sys.exit(exit_code(outcomes))


def _table(outcomes: Sequence[Outcome], known: Mapping[str, Known]) -> Table:
    """Every cell, and what moved against the baseline."""
    from rich.table import Table

    from lfmc.check.report import COLUMNS, told_rows

    table = Table(title="check", title_justify="left")
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in told_rows(outcomes, known):
        table.add_row(*row)
    return table
