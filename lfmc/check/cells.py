"""Run one cell: export it, or verify its cached bundle.

Each cell runs `lfmc` commands in separate processes: a runtime that crashes does not stop the
other cells, and a target can have its own Python environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lfmc.bundle.bundle import MANIFEST, open_bundle
from lfmc.check.baseline import Numbers
from lfmc.check.cell_key import cell_key, package_versions
from lfmc.check.config import Cell, Gates
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.errors import GateError, InputError, LfmcError, UnsupportedError
from lfmc.machine.cache import cache_folder
from lfmc.machine.isolated import ensure_environment, installed_packages
from lfmc.targets.base import get_target

Status = Literal["passed", "failed", "not executed", "skipped", "error"]
STATUSES: Mapping[int, Status] = {
    InputError.exit_code: "error",
    GateError.exit_code: "failed",
    UnsupportedError.exit_code: "skipped",
}


@dataclass(frozen=True)
class Outcome:
    """The result of a cell.

    `reasons` are messages about why the cell did not pass. `exit_code` is the exit code of the
    command that failed, `place` the first difference that this command found. `cached` means that
    a cached bundle was verified instead of a new export.
    """

    cell: Cell
    status: Status
    reasons: tuple[str, ...] = ()
    numbers: Numbers | None = None
    fingerprint: str | None = None
    bundle: Path | None = None
    cached: bool = False
    exit_code: int = 0
    seconds: float = 0.0
    speed: float | None = None
    place: Mapping[str, Any] | None = None


def run_cell(
    cell: Cell,
    folder: Path,
    bundles: Path,
    progress: Callable[[str], None] = lambda detail: None,
    *,
    fresh: bool = False,
) -> Outcome:
    """Export a cell into `bundles`, or verify its cached bundle unless `fresh`; check its gates.

    Paths of the cell are relative to `folder`. `progress` receives each command that the cell runs.
    """
    started = time.monotonic()
    try:
        outcome = _export_or_verify(cell, folder, bundles, progress, fresh)
    except LfmcError as error:
        status = STATUSES.get(error.exit_code, "error")
        outcome = Outcome(cell, status, (str(error),), exit_code=error.exit_code)
    return replace(outcome, seconds=time.monotonic() - started)


def _export_or_verify(
    cell: Cell, folder: Path, bundles: Path, progress: Callable[[str], None], fresh: bool
) -> Outcome:
    model = None if cell.model is None else _resolve_model(cell.model, folder)
    adapter = None if cell.adapter is None else _resolve_model(cell.adapter, folder)
    checkpoint = open_checkpoint(model, adapter)
    extra = get_target(cell.target).extra
    python = ensure_environment(extra) if cell.isolated else Path(sys.executable)
    packages = installed_packages(python) if cell.isolated else package_versions(extra)
    bundle = bundles / cell_key(cell, checkpoint, folder, packages)
    if fresh and bundle.exists():
        shutil.rmtree(bundle)  # otherwise a failed export would leave the old bundle in the cache
    cached = (bundle / MANIFEST).is_file()
    if cached:
        result = _run_lfmc(python, folder, progress, "verify", str(bundle))
    else:
        models = [] if model is None else [model]
        flags = ["--target", cell.target, "--output", str(bundle), "--force", "--trace"]
        flags += cell.arguments if adapter is None else ("--adapter", adapter, *cell.arguments)
        result = _run_lfmc(python, folder, progress, "export", *models, *flags)
    outcome = Outcome(cell, "passed", fingerprint=checkpoint.fingerprint, cached=cached)
    if result.exit_code:
        return _failed_outcome(outcome, result)
    bundle.touch()
    manifest = open_bundle(bundle).manifest
    numbers, not_executed = Numbers.from_manifest(manifest), manifest["not_executed"]
    outcome = replace(outcome, numbers=numbers, bundle=bundle)
    if not_executed is not None:
        return replace(outcome, status="not executed", reasons=(not_executed,))
    if cell.gates.min_speed is not None:
        result = _run_lfmc(python, folder, progress, "bench", str(bundle))
        if result.exit_code:
            return _failed_outcome(outcome, result)
        outcome = replace(outcome, speed=float(result.output["decode"]["best"]))
    reasons = broken_gates(cell.gates, numbers, outcome.speed)
    if not reasons:
        return outcome
    return replace(outcome, status="failed", reasons=reasons, exit_code=GateError.exit_code)


def _failed_outcome(outcome: Outcome, result: _CommandResult) -> Outcome:
    """Return the outcome of a cell whose command failed."""
    status = STATUSES.get(result.exit_code, "error")
    place = result.output.get("place")
    reasons = (result.reason, *([] if place is None else [_describe_place(place)]))
    return replace(outcome, status=status, reasons=reasons, place=place, exit_code=result.exit_code)


def _describe_place(place: Mapping[str, Any]) -> str:
    """Return one line about a `lfmc.parity.place.Place` in JSON."""
    case = "" if place["case"] is None else f", in {place['case']}"
    difference = float(place["difference"])
    return f"first difference: {place['where']}, by {difference:.3g}{case}"


def broken_gates(gates: Gates, numbers: Numbers, speed: float | None) -> tuple[str, ...]:
    """Return a message for every gate that is not met, with its limit and the measured value."""
    messages = []
    for key, value, is_minimum, limit in (
        ("max-kl", numbers.kl, False, gates.max_kl),
        ("min-top1", numbers.top1, True, gates.min_top1),
        ("min-speed", speed, True, gates.min_speed),
    ):
        if limit is None:
            continue
        if value is None:
            messages.append(f"{key} = {limit:g} was not measured")
        elif not (value >= limit if is_minimum else value <= limit):  # NaN meets no gate
            messages.append(f"{key} = {limit:g} is not met: {value:.4f}")
    return tuple(messages)


@dataclass(frozen=True)
class _CommandResult:
    """A command's exit code, its JSON output, and the reason of a failure."""

    exit_code: int
    output: Mapping[str, Any]
    reason: str


def _run_lfmc(
    python: Path, folder: Path, progress: Callable[[str], None], *arguments: str
) -> _CommandResult:
    progress(f"lfmc {' '.join(arguments)}")
    command = [str(python), "-m", "lfmc", *arguments, "--json", "--quiet"]
    environment = {**os.environ, "LFMC_CACHE": str(cache_folder().absolute())}
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    lines = process.stdout.strip().splitlines()
    try:
        output = json.loads(lines[-1]) if lines else {}
    except ValueError:
        output = {}
    code = process.returncode
    if not code:
        return _CommandResult(0, output, "")
    last_line = (process.stderr.strip().splitlines() or ["no output on stderr"])[-1]
    status = f"signal {-code}" if code < 0 else f"exit {code}"
    reason = output.get("details", f"{arguments[0]}: {status}: {last_line}")
    return _CommandResult(code, output, reason)


def _resolve_model(name: str, folder: Path) -> str:
    """Return the path of a model below `folder`, or `name` itself (a hub id) if there is none."""
    return str(folder / name) if (folder / name).is_dir() else name
