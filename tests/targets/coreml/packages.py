"""Packages that the tests use, and the parity matrix of a package."""

from __future__ import annotations

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.calib_free.plan.bit_plan import PlanRow
from lfmc.parity.compare import Rung
from lfmc.run.stepper import Stepper
from tests.targets.lowering import Choose, Lowered, expert_of, floats


def four_bit(row: PlanRow) -> Format:
    return Format(4, 32, False, "float16")


def mixed(row: PlanRow) -> Format:
    """Experts of 4 and 8 bits, w2 opposite to w1 and w3, and a symmetric 8-bit embedding."""
    if row.role == "expert":
        turn = expert_of(row) + row.name.endswith("w2.weight")
        return Format((4, 8)[turn % 2], 32, False, "float16")
    return Format(8 if row.role in ("embedding", "head") else 4, 32, True, "float16")


def palettes(row: PlanRow) -> Format:
    """Experts of every bit width (2, 3, 4, 6, 8), and palettes elsewhere."""
    widths = {
        2: Format(2, 0, True, "float16"),
        3: Format(3, 0, True, "float16"),
        4: Format(4, 32, False, "float16"),
        6: Format(6, 0, True, "float16"),
        8: Format(8, 32, True, "float16"),
    }
    if row.role == "expert":
        return widths[(2, 3, 4, 6, 8)[(expert_of(row) + row.name.endswith("w2.weight")) % 5]]
    return widths[{"embedding": 6, "head": 6}.get(row.role, 3)]


def half(row: PlanRow) -> Floats:
    return Floats("float16")


CONV_IO = {"layout": "conv-io"}
PACKAGES: list[tuple[str, Choose, dict[str, str]]] = [
    ("lfm2", four_bit, {}),
    ("lfm2", half, CONV_IO),
    ("lfm2-conv-bias", mixed, CONV_IO),
    ("lfm2-untied", mixed, {}),
    ("lfm2_moe", mixed, {}),
    ("lfm2_moe", palettes, {}),
    ("lfm2_moe", palettes, {"experts": "dense", "chunk": "16"}),
    ("lfm3", palettes, CONV_IO),
    ("lfm2_moe", floats, {}),
    ("lfm2_moe-scaled", four_bit, CONV_IO),
    ("lfm2_moe-no-bias", mixed, {}),
    ("lfm3", mixed, {}),
    ("lfm3-attention-bias", four_bit, CONV_IO),
    ("lfm3-plain", floats, {}),
]


FLOAT16 = 1e-2  # the differences in rounding mode are 1.9e-3 to 4.6e-3 on these packages


def matrix_rung(build: Lowered, stepper: Stepper, tolerance: float) -> Rung:
    """Compare a package, run by `stepper`, with its program in torch on the full parity matrix."""
    return build.run_matrix(stepper, build.in_torch, tolerance=tolerance)
