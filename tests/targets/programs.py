"""Checkpoints and plans that the tests of several targets use."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import pytest

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.calib_free.plan.bit_plan import PlanRow
from tests.targets.lowering import Choose, expert_of, four_bit


def mixed(row: PlanRow) -> Format:
    """Every bit width, with and without zero points; w2 of an expert differs from its w1 and w3."""
    if row.role == "expert":
        turn = expert_of(row) + row.name.endswith("w2.weight")
        return Format((2, 3, 4, 6, 8)[turn % 5], 32, turn % 2 == 0, "float16")
    if row.role in ("embedding", "head"):
        return Format(6, 32, False, "float16")
    if "proj" in row.name:
        return Format(8, 32, True, "float16")
    return Format(3, 32, False, "float16")


def floats(row: PlanRow) -> Floats:
    return Floats("bfloat16")


PROGRAMS: list[tuple[str, Choose]] = [
    ("lfm2-conv-bias", floats),
    ("lfm2-untied", four_bit),
    ("lfm3-attention-bias", mixed),
    ("lfm2_moe", mixed),
    ("lfm2_moe-scaled", floats),
]


def some_slow(values: Sequence[Any], quick: Container[Any]) -> list[Any]:
    """Return values as test parameters; those that are not in `quick` run with --slow only."""
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]


def mostly_slow(programs: Sequence[tuple[str, Choose]], quick: str) -> list[Any]:
    """Return programs as test parameters; all but the checkpoint `quick` run with --slow only.

    Use it for runtimes that take a minute per program and run the same code for all programs.
    """
    marks = {False: [pytest.mark.slow], True: []}
    return [pytest.param(*program, marks=marks[program[0] == quick]) for program in programs]
