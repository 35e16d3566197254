"""What a run of the matrix found, for machines and for a pull request: JSON, JUnit, Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lfmc.check.baseline import Known
from lfmc.check.cells import Outcome

JSON, JUNIT, SUMMARY = "check.json", "junit.xml", "summary.md"
COLUMNS = ("cell", "", "KL", "top-1", "bytes", "bits a weight", "tokens/s", "seconds")


def write_reports(folder: Path, outcomes: Sequence[Outcome], known: Mapping[str, Known]) -> None:
    """All three into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps(to_dict(outcomes), indent=2) + "\n"
    (folder / JSON).write_text(told, encoding="utf-8")
    (folder / JUNIT).write_text(junit(outcomes), encoding="utf-8")
    (folder / SUMMARY).write_text(markdown(outcomes, known), encoding="utf-8")


def to_dict(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every cell by name."""
    return {
        "cells": {
            own.cell.name: {
                "model": own.cell.model,
                "target": own.cell.target,
                "status": own.status,
                "reasons": list(own.reasons),
                "place": own.place,
                "numbers": asdict(own.numbers) if own.numbers else None,
                "tokens_per_second": own.speed,
                "fingerprint": own.fingerprint,
                "bundle": str(own.bundle) if own.bundle else None,
                "kept": own.kept,
                "seconds": round(own.seconds, 2),
            }
            for own in outcomes
        }
    }


def junit(outcomes: Sequence[Outcome]) -> str:
    """JUnit's XML, a test case a cell; what was not executed counts as skipped, with the reason."""
    kinds = {"failed": "failure", "error": "error", "skipped": "skipped", "not executed": "skipped"}
    found = [kinds.get(own.status) for own in outcomes]
    suite = ElementTree.Element(
        "testsuite",
        name="lfmc check",
        tests=str(len(outcomes)),
        failures=str(found.count("failure")),
        errors=str(found.count("error")),
        skipped=str(found.count("skipped")),
        time=f"{sum(own.seconds for own in outcomes):.3f}",
    )
    for own, kind in zip(outcomes, found, strict=True):
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"lfmc.{own.cell.target}",
            name=own.cell.name,
            time=f"{own.seconds:.3f}",
        )
        if kind:
            ElementTree.SubElement(case, kind, message=_first(own)).text = "\n".join(own.reasons)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def told_rows(outcomes: Sequence[Outcome], known: Mapping[str, Known]) -> list[tuple[str, ...]]:
    """What a table shows of each cell, by `COLUMNS`; a number that moved, beside the baseline's."""
    return [_row(own, known.get(own.cell.name)) for own in outcomes]


def markdown(outcomes: Sequence[Outcome], known: Mapping[str, Known]) -> str:
    """A table, and the reasons under it."""
    lines = ["### lfmc check", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += map(_line, told_rows(outcomes, known))
    for own in outcomes:
        if own.reasons:
            told = "\n".join(own.reasons)
            lines += ["", f"**{own.cell.name}**: {own.status}", "", "```", told, "```"]
    return "\n".join(lines) + "\n"


def _row(own: Outcome, known: Known | None) -> tuple[str, ...]:
    numbers = own.numbers
    speed = "" if own.speed is None else f"{own.speed:.0f}"
    state = own.status + (", kept" if own.kept and own.status == "passed" else "")
    if own.status == "passed" and known is None:
        state += ", new"
    elif own.status == "passed" and known and known.fingerprint != own.fingerprint:
        state += ", other weights"
    if numbers is None:
        return own.cell.name, state, "", "", "", "", speed, f"{own.seconds:.0f}"
    base = numbers if known is None else known.numbers
    return (
        own.cell.name,
        state,
        _moved("{:.4f}", numbers.kl, base.kl),
        _moved("{:.4f}", numbers.top1, base.top1),
        _moved("{:,}", numbers.nbytes, base.nbytes),
        f"{numbers.bits_per_weight:.3f}",
        speed,
        f"{own.seconds:.0f}",
    )


def _moved(form: str, now: float | None, before: float | None) -> str:
    if now is None:
        return ""
    new, old = form.format(now), None if before is None else form.format(before)
    return new if old in (None, new) else f"{new} (was {old})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _first(own: Outcome) -> str:
    return own.reasons[0].splitlines()[0] if own.reasons else own.status
