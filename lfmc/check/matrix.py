"""The whole matrix: every cell, then what changed against the baseline."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lfmc.check.baseline import Known, drifted, load_baseline, save_baseline
from lfmc.check.cells import Outcome, run_cell
from lfmc.check.config import Cell, Drift, Matrix
from lfmc.errors import GateError, InputError, UnsupportedError
from lfmc.machine.cache import cache_folder

KEPT_DAYS = 30


def bundles_folder() -> Path:
    """Where bundles of cells are kept, by key: absolute, as cells run in another folder."""
    return (cache_folder() / "cells").resolve()


def run_matrix(
    matrix: Matrix,
    *,
    only: Sequence[str] = (),
    fresh: bool = False,
    accept: bool = False,
    observe: Callable[[Cell], None] = lambda cell: None,
) -> list[Outcome]:
    """Run cells, all or those of a name, one after the other, and compare them with the baseline.

    With `accept` it is rewritten instead: cells that passed have their numbers, those that could
    not be executed here keep what they had, and those that are no longer in the matrix go.
    """
    names = [cell.name for cell in matrix.cells]
    for name in only:
        if name not in names:
            raise InputError("there is no such cell", expected=", ".join(names), got=name)
    known = load_baseline(matrix.baseline)
    folder = bundles_folder()
    outcomes = []
    for cell in matrix.cells:
        if only and cell.name not in only:
            continue
        observe(cell)
        outcome = run_cell(cell, matrix.folder, folder, fresh=fresh)
        outcomes.append(outcome if accept else against(outcome, known, matrix.drift))
    _forget_old(folder)
    if accept:
        save_baseline(matrix.baseline, _accepted(outcomes, known, names))
    return outcomes


def against(outcome: Outcome, known: dict[str, Known], drift: Drift) -> Outcome:
    """An outcome with what is worse than the baseline among its reasons."""
    own = known.get(outcome.cell.name)
    if own is None or outcome.numbers is None:
        return outcome
    worse = drifted(outcome.numbers, own.numbers, drift)
    if not worse:
        return outcome
    reasons = (*(outcome.reasons if outcome.status == "failed" else ()), *worse)
    return replace(outcome, status="failed", reasons=reasons, exit_code=GateError.exit_code)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """3 for a broken gate; else that of the first error; 4 where nothing was executed at all."""
    if any(own.status == "failed" for own in outcomes):
        return GateError.exit_code
    errors = [own.exit_code for own in outcomes if own.status == "error"]
    if errors:
        return errors[0] if errors[0] == InputError.exit_code else 1
    executed = any(own.status == "passed" for own in outcomes)
    return 0 if executed else UnsupportedError.exit_code


def _accepted(
    outcomes: Sequence[Outcome], known: dict[str, Known], names: Sequence[str]
) -> dict[str, Known]:
    new = {
        own.cell.name: Known(own.numbers, own.fingerprint)
        for own in outcomes
        if own.status == "passed" and own.numbers is not None and own.fingerprint is not None
    }
    return {name: own for name, own in (known | new).items() if name in names}


def _forget_old(folder: Path) -> None:
    """Remove bundles that no run has used for a month."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for place in folder.iterdir() if folder.is_dir() else ():
        if place.stat().st_mtime < oldest:
            shutil.rmtree(place, ignore_errors=True)
