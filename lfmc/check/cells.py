"""Running one cell: export it, or prove again the bundle that is kept of it.

Each runs in a process of its own, by the very commands that a person would type: a runtime that
crashes takes no other cell with it, and a target may have an environment of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lfmc.bundle.bundle import MANIFEST, open_bundle
from lfmc.check.baseline import Numbers
from lfmc.check.cell_key import cell_key, versions
from lfmc.check.config import Cell, Gates
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.errors import GateError, InputError, LfmcError, UnsupportedError
from lfmc.machine.isolated import environment, installed_in
from lfmc.targets.base import get_target

Status = Literal["passed", "failed", "not executed", "skipped", "error"]
STATUSES: Mapping[int, Status] = {
    InputError.exit_code: "error",
    GateError.exit_code: "failed",
    UnsupportedError.exit_code: "skipped",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a cell. `reasons` say why it did not pass; `exit_code` is that of the command
    that did not succeed, `place` where it found the first difference. `kept`: the bundle was there,
    and was proven again."""

    cell: Cell
    status: Status
    reasons: tuple[str, ...] = ()
    numbers: Numbers | None = None
    fingerprint: str | None = None
    bundle: Path | None = None
    kept: bool = False
    exit_code: int = 0
    seconds: float = 0.0
    speed: float | None = None
    place: Mapping[str, Any] | None = None


def run_cell(cell: Cell, folder: Path, bundles: Path, *, fresh: bool = False) -> Outcome:
    """Export a cell into `bundles`, or prove the bundle that is there, unless `fresh`; then hold
    its numbers against its gates. Paths of the cell are relative to `folder`."""
    started = time.monotonic()
    try:
        outcome = _run(cell, folder, bundles, fresh)
    except LfmcError as error:
        status = STATUSES.get(error.exit_code, "error")
        outcome = Outcome(cell, status, (str(error),), exit_code=error.exit_code)
    return replace(outcome, seconds=time.monotonic() - started)


def _run(cell: Cell, folder: Path, bundles: Path, fresh: bool) -> Outcome:
    model = None if cell.model is None else _model(cell.model, folder)
    checkpoint = open_checkpoint(model)
    extra = get_target(cell.target).extra
    python = environment(extra) if cell.isolated else Path(sys.executable)
    packages = installed_in(python) if cell.isolated else versions(extra)
    place = bundles / cell_key(cell, checkpoint, folder, packages)
    if fresh and place.exists():
        shutil.rmtree(place)  # else a failed export would leave it to be kept
    kept = (place / MANIFEST).is_file()
    if kept:
        told = _lfmc(python, folder, "verify", str(place))
    else:
        named = [] if model is None else [model]
        flags = ["--target", cell.target, "--output", str(place), "--force", "--trace"]
        flags += cell.arguments
        told = _lfmc(python, folder, "export", *named, *flags)
    outcome = Outcome(cell, "passed", fingerprint=checkpoint.fingerprint, kept=kept)
    if told.code:
        return _stopped(outcome, told)
    place.touch()
    manifest = open_bundle(place).manifest
    numbers, not_executed = Numbers.of(manifest), manifest["not_executed"]
    outcome = replace(outcome, numbers=numbers, bundle=place)
    if not_executed is not None:
        return replace(outcome, status="not executed", reasons=(not_executed,))
    if cell.gates.min_speed is not None:
        timed = _lfmc(python, folder, "bench", str(place))
        if timed.code:
            return _stopped(outcome, timed)
        outcome = replace(outcome, speed=float(timed.found["decode"]["best"]))
    broken = broken_gates(cell.gates, numbers, outcome.speed)
    if not broken:
        return outcome
    return replace(outcome, status="failed", reasons=broken, exit_code=GateError.exit_code)


def _stopped(outcome: Outcome, told: _Told) -> Outcome:
    """An outcome whose command did not succeed."""
    status = STATUSES.get(told.code, "error")
    place = told.found.get("place")
    reasons = (told.reason, *([] if place is None else [_where(place)]))
    return replace(outcome, status=status, reasons=reasons, place=place, exit_code=told.code)


def _where(place: Mapping[str, Any]) -> str:
    """A place as `lfmc.parity.place` has it, in a line."""
    case = "" if place["case"] is None else f", in {place['case']}"
    off = float(place["difference"])
    return f"first place that differs: {place['where']}, by {off:.3g}{case}"


def broken_gates(gates: Gates, numbers: Numbers, speed: float | None) -> tuple[str, ...]:
    """What does not hold, each with the number and what was asked."""
    told = []
    for key, found, least, asked in (
        ("max-kl", numbers.kl, False, gates.max_kl),
        ("min-top1", numbers.top1, True, gates.min_top1),
        ("min-speed", speed, True, gates.min_speed),
    ):
        if asked is None:
            continue
        if found is None:
            told.append(f"{key} = {asked:g} was not measured")
        elif not (found >= asked if least else found <= asked):  # not a number holds nothing
            told.append(f"{key} = {asked:g} does not hold: {found:.4f}")
    return tuple(told)


@dataclass(frozen=True)
class _Told:
    """What a command printed as JSON, its exit code, and the reason where that is not 0."""

    code: int
    found: Mapping[str, Any]
    reason: str


def _lfmc(python: Path, folder: Path, *arguments: str) -> _Told:
    command = [str(python), "-m", "lfmc", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        found = {}
    if not done.returncode:
        return _Told(0, found, "")
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
    return _Told(done.returncode, found, found.get("details", f"{arguments[0]}: {how}: {last}"))


def _model(name: str, folder: Path) -> str:
    """A folder relative to the file's, or a hub id as it stands."""
    return str(folder / name) if (folder / name).is_dir() else name
