"""Run all cells of a matrix and compare them with the baseline."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lfmc.check.baseline import BaselineCell, find_regressions, load_baseline, save_baseline
from lfmc.check.cells import Outcome, run_cell
from lfmc.check.config import Drift, Matrix
from lfmc.errors import GateError, InputError, UnsupportedError, did_you_mean
from lfmc.machine.cache import cache_folder
from lfmc.machine.progress import Progress

CACHE_DAYS = 30  # bundles that no run used for this many days are removed


def bundles_folder() -> Path:
    """Return the folder of cached bundles, as an absolute path: cells run in other folders."""
    return (cache_folder() / "cells").resolve()


def run_matrix(
    matrix: Matrix,
    *,
    only: Sequence[str] = (),
    fresh: bool = False,
    accept: bool = False,
    progress: Progress,
) -> list[Outcome]:
    """Run all cells, or those named in `only`, in order, and compare them with the baseline.

    Each cell is a stage of `progress`. A step is a command that the cell runs.

    With `accept`, write the baseline instead. Cells that passed get their new numbers, cells that
    did not pass keep their old ones, and cells that are no longer in the matrix are removed.
    """
    names = [cell.name for cell in matrix.cells]
    for name in only:
        if name not in names:
            raise InputError(
                "there is no such cell",
                expected=", ".join(names),
                got=name,
                todo=did_you_mean(name, names),
            )
    baseline = load_baseline(matrix.baseline)
    folder = bundles_folder()
    outcomes = []
    cells = [cell for cell in matrix.cells if not only or cell.name in only]
    progress.expect(len(cells))
    for cell in cells:
        with progress.stage(cell.name):
            outcome = run_cell(cell, matrix.folder, folder, progress.step, fresh=fresh)
        if not accept:
            outcome = compare_with_baseline(outcome, baseline, matrix.drift)
        outcomes.append(outcome)
    _remove_old_bundles(folder)
    if accept:
        save_baseline(matrix.baseline, _updated_baseline(outcomes, baseline, names))
    return outcomes


def compare_with_baseline(
    outcome: Outcome, baseline: dict[str, BaselineCell], drift: Drift
) -> Outcome:
    """Return the outcome, failed if a number is worse than in the baseline by more than `drift`."""
    cell = baseline.get(outcome.cell.name)
    if cell is None or outcome.numbers is None:
        return outcome
    regressions = find_regressions(outcome.numbers, cell.numbers, drift)
    if not regressions:
        return outcome
    reasons = (*(outcome.reasons if outcome.status == "failed" else ()), *regressions)
    return replace(outcome, status="failed", reasons=reasons, exit_code=GateError.exit_code)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 3 if a cell failed, else 2 or 1 for an error, 4 if no cell was executed, else 0."""
    if any(outcome.status == "failed" for outcome in outcomes):
        return GateError.exit_code
    errors = [outcome.exit_code for outcome in outcomes if outcome.status == "error"]
    if errors:
        return errors[0] if errors[0] == InputError.exit_code else 1
    executed = any(outcome.status == "passed" for outcome in outcomes)
    return 0 if executed else UnsupportedError.exit_code


def _updated_baseline(
    outcomes: Sequence[Outcome], baseline: dict[str, BaselineCell], names: Sequence[str]
) -> dict[str, BaselineCell]:
    passed = {
        outcome.cell.name: BaselineCell(outcome.numbers, outcome.fingerprint)
        for outcome in outcomes
        if outcome.status == "passed"
        and outcome.numbers is not None
        and outcome.fingerprint is not None
    }
    return {name: cell for name, cell in (baseline | passed).items() if name in names}


def _remove_old_bundles(folder: Path) -> None:
    """Remove bundles that no run has used for `CACHE_DAYS`."""
    oldest = time.time() - CACHE_DAYS * 24 * 3600
    for bundle in folder.iterdir() if folder.is_dir() else ():
        if bundle.stat().st_mtime < oldest:
            shutil.rmtree(bundle, ignore_errors=True)
