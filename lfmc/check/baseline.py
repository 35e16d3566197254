"""The baseline of `lfmc check`: accepted numbers per cell, in a JSON file under version control."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfmc.check.config import Drift
from lfmc.errors import InputError


@dataclass(frozen=True)
class Numbers:
    """Quality (parity rung 4; None if the bundle was not executed) and size of a bundle."""

    kl: float | None
    top1: float | None
    nbytes: int
    bits_per_weight: float

    @staticmethod
    def from_manifest(manifest: Mapping[str, Any]) -> Numbers:
        report = manifest["report"]
        quality = report["quality"] or {}
        nbytes, parameters = report["artifact_nbytes"], manifest["model"]["parameters"]
        bits = round(8 * nbytes / parameters, 4)
        return Numbers(quality.get("kl"), quality.get("top1"), nbytes, bits)


@dataclass(frozen=True)
class BaselineCell:
    """A cell's accepted numbers, and the fingerprint of the checkpoint that they belong to."""

    numbers: Numbers
    fingerprint: str


def load_baseline(path: Path) -> dict[str, BaselineCell]:
    """Return the cells of a baseline file by name; an empty dict if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: BaselineCell(Numbers(**cell["numbers"]), cell["fingerprint"])
            for name, cell in data["cells"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "the baseline can't be read",
            where=path,
            got=error,
            todo="delete the file; lfmc check --accept writes a new one",
        ) from error


def save_baseline(path: Path, cells: Mapping[str, BaselineCell]) -> None:
    """Write a baseline with the cells sorted by name, so that a diff shows only changed cells."""
    rows = {name: asdict(cell) for name, cell in sorted(cells.items())}
    path.write_text(json.dumps({"cells": rows}, indent=2) + "\n", encoding="utf-8")


def find_regressions(numbers: Numbers, baseline: Numbers, drift: Drift) -> tuple[str, ...]:
    """Return a message for every number that is worse than the baseline by more than `drift`."""
    regressions = []
    if numbers.kl is not None and baseline.kl is not None:
        highest = baseline.kl * (1 + drift.kl)
        if not numbers.kl <= highest:  # NaN is a regression, too
            regressions.append(
                f"KL went from {baseline.kl:.4f} to {numbers.kl:.4f} (at most {highest:.4f})"
            )
    if numbers.top1 is not None and baseline.top1 is not None:
        lowest = baseline.top1 - drift.top1
        if not numbers.top1 >= lowest:
            regressions.append(
                f"top-1 went from {baseline.top1:.4f} to {numbers.top1:.4f} (at least {lowest:.4f})"
            )
    if numbers.nbytes > baseline.nbytes * (1 + drift.size):
        regressions.append(f"size went from {baseline.nbytes:,} to {numbers.nbytes:,} bytes")
    return tuple(regressions)
