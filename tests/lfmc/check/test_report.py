"""Reports, exit codes and gates of `lfmc check`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lfmc.check.baseline import BaselineCell, Numbers
from lfmc.check.cells import Outcome, Status, broken_gates
from lfmc.check.config import Cell, Gates
from lfmc.check.matrix import exit_code
from lfmc.check.report import JSON, JUNIT, SUMMARY, write_reports

NUMBERS = Numbers(kl=0.1, top1=0.8, nbytes=1000, bits_per_weight=4.5)


def make_outcome(name: str, status: Status, *reasons: str, code: int = 0) -> Outcome:
    cell = Cell(name, None, "onnx", (), Gates(), isolated=False)
    numbers = NUMBERS if status in ("passed", "not executed") else None
    return Outcome(cell, status, reasons, numbers, "abc", exit_code=code, seconds=1.5)


OUTCOMES = [
    make_outcome("good", "passed"),
    make_outcome("bad", "failed", "KL is 2\n  <much>", code=3),
    make_outcome("away", "not executed", "no such chip here"),
    make_outcome("lacking", "skipped", "this target needs the package 'x'", code=4),
    make_outcome("broken", "error", "export: signal 11: no output on stderr", code=-11),
]


def test_three_reports(tmp_path: Path) -> None:
    baseline = {"good": BaselineCell(replace(NUMBERS, kl=0.2), "other")}
    write_reports(tmp_path / "out", OUTCOMES, baseline)
    cells = json.loads((tmp_path / "out" / JSON).read_text())["cells"]
    assert {name: cell["status"] for name, cell in cells.items()} == {
        outcome.cell.name: outcome.status for outcome in OUTCOMES
    }
    assert cells["good"]["numbers"]["kl"] == 0.1
    suite = ElementTree.parse(tmp_path / "out" / JUNIT).getroot()
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "5", "failures": "1", "errors": "1", "skipped": "2"}
    (failure,) = suite.iter("failure")
    assert failure.text == "KL is 2\n  <much>"
    assert failure.get("message") == "KL is 2"
    summary = (tmp_path / "out" / SUMMARY).read_text()
    assert "| good | passed, other weights | 0.1000 (was 0.2000) | 0.8000 | 1,000 |" in summary
    assert "**lacking**: skipped\n\n```\nthis target needs the package 'x'\n```" in summary


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["good"], 0),
        (["good", "away", "lacking"], 0),
        (["away", "lacking"], 4),  # exit code 0 requires an executed cell
        (["good", "broken"], 1),
        (["broken", "bad"], 3),
    ],
)
def test_exit_codes(names: list[str], code: int) -> None:
    assert exit_code([outcome for outcome in OUTCOMES if outcome.cell.name in names]) == code


def test_wrong_input_exits_with_2() -> None:
    assert exit_code([make_outcome("x", "error", "no such folder", code=2)]) == 2


def test_gates() -> None:
    gates = Gates(max_kl=0.1, min_top1=0.8, min_speed=10)
    assert broken_gates(gates, NUMBERS, 10.0) == ()
    assert broken_gates(Gates(), NUMBERS, None) == ()
    assert broken_gates(gates, replace(NUMBERS, kl=None), 10.0) == (
        "max-kl = 0.1 was not measured",
    )
    worse = replace(NUMBERS, kl=float("nan"), top1=0.79)
    assert broken_gates(gates, worse, 9.5) == (
        "max-kl = 0.1 is not met: nan",
        "min-top1 = 0.8 is not met: 0.7900",
        "min-speed = 10 is not met: 9.5000",
    )
