"""Numbers that a team has agreed to, in a file beside its code."""

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
    """Of a bundle: rung 4 (None where it was not executed), and the artifact's size."""

    kl: float | None
    top1: float | None
    nbytes: int
    bits_per_weight: float

    @staticmethod
    def of(manifest: Mapping[str, Any]) -> Numbers:
        report = manifest["report"]
        quality = report["quality"] or {}
        nbytes, parameters = report["artifact_nbytes"], manifest["model"]["parameters"]
        bits = round(8 * nbytes / parameters, 4)
        return Numbers(quality.get("kl"), quality.get("top1"), nbytes, bits)


@dataclass(frozen=True)
class Known:
    """A cell in the baseline: its numbers, and the checkpoint that they are of."""

    numbers: Numbers
    fingerprint: str


def load_baseline(path: Path) -> dict[str, Known]:
    """Every cell in a file; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: Known(Numbers(**cell["numbers"]), cell["fingerprint"])
            for name, cell in found["cells"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "the baseline can't be read",
            where=path,
            got=error,
            todo="remove it, and lfmc check --accept writes another",
        ) from error


def save_baseline(path: Path, cells: Mapping[str, Known]) -> None:
    """Write a baseline, cells by name, so that a change of one is a change of its lines only."""
    rows = {name: asdict(own) for name, own in sorted(cells.items())}
    path.write_text(json.dumps({"cells": rows}, indent=2) + "\n", encoding="utf-8")


def drifted(numbers: Numbers, known: Numbers, drift: Drift) -> tuple[str, ...]:
    """What is worse than in the baseline by more than is allowed."""
    told = []
    if numbers.kl is not None and known.kl is not None:
        most = known.kl * (1 + drift.kl)
        if not numbers.kl <= most:  # nor is what is no number
            told.append(f"KL went from {known.kl:.4f} to {numbers.kl:.4f} (at most {most:.4f})")
    if numbers.top1 is not None and known.top1 is not None:
        least = known.top1 - drift.top1
        if not numbers.top1 >= least:
            told.append(
                f"top-1 went from {known.top1:.4f} to {numbers.top1:.4f} (at least {least:.4f})"
            )
    largest = known.nbytes * (1 + drift.size)
    if numbers.nbytes > largest:
        told.append(f"size went from {known.nbytes:,} to {numbers.nbytes:,} bytes")
    return tuple(told)
