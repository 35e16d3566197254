"""The checkpoints and formats of the tests."""

from __future__ import annotations

from lfmc.calib_free.grid.formats import ROW, Floats, Format
from lfmc.calib_free.plan.bit_plan import PlanRow
from tests.targets.lowering import Choose, expert_of

FOUR, EIGHT = Format(4, 32, True, "bfloat16"), Format(8, ROW, True, "float32")


def four_bit(row: PlanRow) -> Format:
    return FOUR


def mixed(row: PlanRow) -> Format:
    """Experts alternate between 4 and 8 bits, with w2 the reverse; an 8-bit embedding."""
    if row.role == "expert":
        turn = expert_of(row) + row.name.endswith("w2.weight")
        return (FOUR, EIGHT)[turn % 2]
    if row.role in ("embedding", "head"):
        return EIGHT
    return FOUR if "proj" in row.name else EIGHT


def floats(row: PlanRow) -> Floats:
    return Floats("float32")


PROGRAMS: list[tuple[str, Choose]] = [
    ("lfm2", floats),
    ("lfm2-untied", four_bit),
    ("lfm3-attention-bias", mixed),
    ("lfm2_moe", mixed),
]
