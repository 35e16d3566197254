"""Reports of `lfmc check`: JSON for programs, JUnit XML for CI, Markdown for a pull request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lfmc.check.baseline import BaselineCell
from lfmc.check.cells import Outcome

JSON, JUNIT, SUMMARY = "check.json", "junit.xml", "summary.md"
COLUMNS = ("cell", "", "KL", "top-1", "bytes", "bits per weight", "tokens/s", "seconds")


def write_reports(
    folder: Path, outcomes: Sequence[Outcome], baseline: Mapping[str, BaselineCell]
) -> None:
    """Write the three reports into a folder; create the folder if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_dict(outcomes), indent=2) + "\n"
    (folder / JSON).write_text(text, encoding="utf-8")
    (folder / JUNIT).write_text(junit(outcomes), encoding="utf-8")
    (folder / SUMMARY).write_text(markdown(outcomes, baseline), encoding="utf-8")


def to_dict(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the outcomes by cell name, as JSON values."""
    return {
        "cells": {
            outcome.cell.name: {
                "model": outcome.cell.model,
                "target": outcome.cell.target,
                "status": outcome.status,
                "reasons": list(outcome.reasons),
                "place": outcome.place,
                "numbers": asdict(outcome.numbers) if outcome.numbers else None,
                "tokens_per_second": outcome.speed,
                "fingerprint": outcome.fingerprint,
                "bundle": str(outcome.bundle) if outcome.bundle else None,
                "kept": outcome.cached,
                "seconds": round(outcome.seconds, 2),
            }
            for outcome in outcomes
        }
    }


def junit(outcomes: Sequence[Outcome]) -> str:
    """Return JUnit XML with a test case per cell; a cell that was not executed is skipped."""
    tags = {"failed": "failure", "error": "error", "skipped": "skipped", "not executed": "skipped"}
    results = [tags.get(outcome.status) for outcome in outcomes]
    suite = ElementTree.Element(
        "testsuite",
        name="lfmc check",
        tests=str(len(outcomes)),
        failures=str(results.count("failure")),
        errors=str(results.count("error")),
        skipped=str(results.count("skipped")),
        time=f"{sum(outcome.seconds for outcome in outcomes):.3f}",
    )
    for outcome, tag in zip(outcomes, results, strict=True):
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"lfmc.{outcome.cell.target}",
            name=outcome.cell.name,
            time=f"{outcome.seconds:.3f}",
        )
        if tag:
            element = ElementTree.SubElement(case, tag, message=_first_reason(outcome))
            element.text = "\n".join(outcome.reasons)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def table_rows(
    outcomes: Sequence[Outcome], baseline: Mapping[str, BaselineCell]
) -> list[tuple[str, ...]]:
    """Return a row of `COLUMNS` per cell; the baseline's number follows a changed number."""
    return [_row(outcome, baseline.get(outcome.cell.name)) for outcome in outcomes]


def markdown(outcomes: Sequence[Outcome], baseline: Mapping[str, BaselineCell]) -> str:
    """Return a Markdown table, followed by the reasons of the cells that did not pass."""
    lines = ["### lfmc check", "", _markdown_row(COLUMNS), _markdown_row(["---"] * len(COLUMNS))]
    lines += map(_markdown_row, table_rows(outcomes, baseline))
    for outcome in outcomes:
        if outcome.reasons:
            text = "\n".join(outcome.reasons)
            lines += ["", f"**{outcome.cell.name}**: {outcome.status}", "", "```", text, "```"]
    return "\n".join(lines) + "\n"


def _row(outcome: Outcome, cell: BaselineCell | None) -> tuple[str, ...]:
    name, numbers, seconds = outcome.cell.name, outcome.numbers, f"{outcome.seconds:.0f}"
    speed = "" if outcome.speed is None else f"{outcome.speed:.0f}"
    status: str = outcome.status
    if outcome.status == "passed":
        if outcome.cached:
            status += ", cached"
        if cell is None:
            status += ", new"
        elif cell.fingerprint != outcome.fingerprint:
            status += ", other weights"
    if numbers is None:
        return name, status, "", "", "", "", speed, seconds
    previous = numbers if cell is None else cell.numbers
    return (
        name,
        status,
        _with_previous("{:.4f}", numbers.kl, previous.kl),
        _with_previous("{:.4f}", numbers.top1, previous.top1),
        _with_previous("{:,}", numbers.nbytes, previous.nbytes),
        f"{numbers.bits_per_weight:.3f}",
        speed,
        seconds,
    )


def _with_previous(template: str, value: float | None, previous: float | None) -> str:
    if value is None:
        return ""
    text = template.format(value)
    previous_text = None if previous is None else template.format(previous)
    return text if previous_text in (None, text) else f"{text} (was {previous_text})"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _first_reason(outcome: Outcome) -> str:
    return outcome.reasons[0].splitlines()[0] if outcome.reasons else outcome.status
