"""Formats of weights that the tests of NPUs choose."""

from __future__ import annotations

from lfmc.calib_free.grid.formats import ROW, Floats, Format
from lfmc.calib_free.plan.bit_plan import PlanRow
from tests.targets.lowering import expert_of


def eight_bit(row: PlanRow) -> Format:
    return Format(8, ROW, True, "float32")


def four_bit_rows(row: PlanRow) -> Format:
    return Format(4, ROW, True, "float32")


def mixed_bits(row: PlanRow) -> Format:
    """Mix 4 and 8 bits; w2 of an expert has another width than its w1 and w3."""
    if row.role == "expert":
        narrow = bool((expert_of(row) + row.name.endswith("w2.weight")) % 2)
    else:
        narrow = row.name.endswith(("out_proj.weight", "w2.weight"))
    return Format(4 if narrow else 8, ROW, True, "float32")


def float16(row: PlanRow) -> Floats:
    return Floats("float16")
