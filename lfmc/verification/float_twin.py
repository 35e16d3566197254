"""Rung 3 with the matrices dequantized to float32, for targets that always round activations.

If the n-bit kernels of a target always round activations, an end-to-end comparison can't detect an
error smaller than the rounding. A float graph is lowered in the same way, except for its products,
which `Target.operator_parity` compares one by one. So the graph with dequantized matrices is also
lowered, and compared at float precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Floats, Format, parse_format
from lfmc.calib_free.plan.bit_plan import PlanRow
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.lowering.build import Build, build
from lfmc.machine.memory import installed_nbytes
from lfmc.machine.progress import Silent
from lfmc.parity.compare import Case, Rung, skipped_rung
from lfmc.parity.expert_choices import NEAR_TIE

TITLE = "artifact with float32 matrices vs. torch"
MAX_FLOAT_NBYTES = 2 << 30  # one file of every target can store this many bytes of floats
COPIES = 5  # of the floats at once: written, loaded, packed and in torch; 3.8 measured at 350M
FLOAT = Floats("float32")


@dataclass
class FloatWeights(PlannedWeights):
    """The dequantized values of a plan as floats; `planned` has the codes."""

    planned: PlannedWeights = field(kw_only=True)

    def floats(self, sources: tuple[str, ...]) -> Tensor:
        return torch.cat([self.planned.dequantized(name) for name in sources])


def dequantized_build(export_build: Build) -> Build | None:
    """Return a copy of the build whose matrices are dequantized to float32.

    Returns None if the target is already exact with codes, or is not exact even with floats.
    """
    target, checkpoint, plan = export_build.target, export_build.checkpoint, export_build.plan
    if export_build.tolerance(exact=target.exact) is not None:
        return None
    rows = tuple(_float_row(row) for row in plan.rows)
    float_plan = replace(plan, rows=rows)
    float_build, _ = build(checkpoint, target, float_plan, export_build.request, Silent())
    if float_build.tolerance(exact=target.exact) is None:
        return None
    weights = FloatWeights(checkpoint, float_build.plan, planned=export_build.weights)
    float_build.program.bind(weights.value)
    return replace(float_build, weights=weights)


def run_float_rungs(export_build: Build, matrix: Sequence[Case]) -> list[Rung]:
    """Run rung 3 with float32 matrices; return [] if the target does not require it."""
    float_build = dequantized_build(export_build)
    if float_build is None:
        return []
    nbytes = sum(row.nbytes for row in float_build.plan.rows)
    if nbytes > MAX_FLOAT_NBYTES:
        reason = f"floats of {nbytes / 2**30:.1f} GiB are too large for a file"
        return [skipped_rung(3, TITLE, reason)]
    if COPIES * nbytes > installed_nbytes():
        reason = f"it takes {COPIES * nbytes / 2**30:.1f} GiB of memory"
        return [skipped_rung(3, TITLE, reason)]
    with tempfile.TemporaryDirectory(prefix="lfmc-") as path:
        folder = Path(path)
        float_build.lower(folder)
        exact = export_build.target.exact
        rung = float_build.compare(TITLE, folder, matrix, exact=exact, near_tie=NEAR_TIE)
    return [rung]


def _float_row(row: PlanRow) -> PlanRow:
    if not isinstance(parse_format(row.format), Format):
        return row
    return replace(row, format=FLOAT.name, grid="none", nbytes=FLOAT.nbytes(row.shape), digest=None)
