"""`lfmc check`: export and verify every cell of a `.lfmc.toml`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lfmc.commands.options import json_option
from lfmc.commands.param_types import FOLDER, PATH
from lfmc.commands.progress import progress_options, start_progress

if TYPE_CHECKING:
    from lfmc.check.baseline import BaselineCell
    from lfmc.check.cells import Outcome
    from lfmc.commands.fitted_table import FittedTable


@click.command("check")
@click.argument("file", type=PATH, default=Path(".lfmc.toml"))
@click.option("--only", multiple=True, metavar="CELL", help="Run only this cell. Repeatable.")
@click.option(
    "--accept", is_flag=True, help="Write the results to the baseline, without comparing them."
)
@click.option("--fresh", is_flag=True, help="Export every cell again, even if it is cached.")
@click.option(
    "--report",
    type=FOLDER,
    help="Folder to write check.json, junit.xml and summary.md to.",
)
@progress_options
@json_option
def command(
    file: Path,
    only: tuple[str, ...],
    accept: bool,
    fresh: bool,
    report: Path | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Export and verify every cell of FILE and compare the results with the baseline.

    FILE is a .lfmc.toml. A cell is one model for one target with its options. lfmc caches each
    bundle: if a cell's model, options, packages and code are unchanged, only the file hashes and
    the golden prompts of its bundle are checked.

    Exit code 3: parity, a gate (max-kl, min-top1, min-speed) or the baseline is not met. Exit code
    4: no cell could be executed on this machine.

    \b
    lfmc init                      # writes .lfmc.toml
    lfmc check --accept            # writes lfmc-baseline.json: commit both
    lfmc check --report out/check  # in continuous integration
    """
    progress = start_progress("check", quiet=quiet, verbose=verbose)
    with progress.stage("load"):
        from lfmc.check.baseline import load_baseline
        from lfmc.check.config import load_matrix
        from lfmc.check.matrix import exit_code, run_matrix
        from lfmc.check.report import to_dict, write_reports
        from lfmc.commands.export import command as export_command
        from lfmc.commands.tables import console

        matrix = load_matrix(file, export_command)
        baseline = load_baseline(matrix.baseline)
    outcomes = run_matrix(
        matrix,
        only=only,
        fresh=fresh,
        accept=accept,
        progress=progress,
    )
    if report is not None:
        write_reports(report, outcomes, baseline)
    if as_json:
        click.echo(json.dumps(to_dict(outcomes)))
    else:
        console().print(_table(outcomes, baseline))
        for outcome in outcomes:
            for reason in outcome.reasons:
                click.echo(f"{outcome.cell.name}: {outcome.status}: {reason}")
        if accept:
            click.echo(f"baseline: {matrix.baseline}")
    sys.exit(exit_code(outcomes))


def _table(outcomes: Sequence[Outcome], baseline: Mapping[str, BaselineCell]) -> FittedTable:
    """Return a table with a row per cell and the numbers that differ from the baseline."""
    from rich.table import Table

    from lfmc.check.report import COLUMNS, table_rows
    from lfmc.commands.fitted_table import FittedTable

    table = Table(title="check", title_justify="left")
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in table_rows(outcomes, baseline):
        table.add_row(*row)
    return FittedTable(table, ("seconds", "bits per weight", "tokens/s", "bytes"))
