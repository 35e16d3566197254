"""The same graph with its matrices as floats: what rounds activations is then exact.

A target whose n-bit kernels always round proves little end to end: a fault that does less than
rounding does goes unseen. Its lowering is the same for floats, but for the products, and those are
compared one by one; so a graph with dequantized matrices is lowered as well, and held to float
precision.
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
from lfmc.machine.progress import Progress, Silent
from lfmc.parity.compare import Case, Rung, skipped
from lfmc.parity.expert_choices import NEAR_TIE

TITLE = "the same graph, its matrices as floats, lowered and run alike = torch"
MOST_NBYTES = 2 << 30  # of floats: what one file of every target holds
COPIES = 5  # of the floats at once, written, loaded, packed and in torch: 3.8 measured at 350M
FLOAT = Floats("float32")


@dataclass
class FloatWeights(PlannedWeights):
    """The values that a plan's codes stand for, as floats; `planned` has the codes."""

    planned: PlannedWeights = field(kw_only=True)

    def floats(self, sources: tuple[str, ...]) -> Tensor:
        return torch.cat([self.planned.dequantized(name) for name in sources])


def float_version(made: Build) -> Build | None:
    """The same with float matrices, and what they hold; None where the target needs it not, being
    exact with codes, or where it is not exact with floats, either."""
    target, checkpoint, plan = made.target, made.checkpoint, made.plan
    if made.tolerance(exact=target.exact) is not None:
        return None
    rows = tuple(_as_float(row) for row in plan.rows)
    floats, _ = build(checkpoint, target, replace(plan, rows=rows), made.asked, Silent())
    if floats.tolerance(exact=target.exact) is None:
        return None
    weights = FloatWeights(checkpoint, floats.plan, planned=made.weights)
    return replace(floats, weights=weights)


def float_rungs(made: Build, matrix: Sequence[Case], progress: Progress) -> list[Rung]:
    """One rung where a target is exact with floats only, else none."""
    floats = float_version(made)
    if floats is None:
        return []
    nbytes = sum(row.nbytes for row in floats.plan.rows)
    if nbytes > MOST_NBYTES:
        return [skipped(3, TITLE, f"floats of {nbytes / 2**30:.1f} GiB are too large for a file")]
    if COPIES * nbytes > installed_nbytes():
        return [skipped(3, TITLE, f"it takes {COPIES * nbytes / 2**30:.1f} GiB of memory")]
    with tempfile.TemporaryDirectory(prefix="lfmc-") as path:
        floats.lower(Path(path))
        floats.bind()
        exact = made.target.exact
        rung = floats.compare(TITLE, Path(path), matrix, progress, exact=exact, near_tie=NEAR_TIE)
    return [rung]


def _as_float(row: PlanRow) -> PlanRow:
    if not isinstance(parse_format(row.format), Format):
        return row
    return replace(row, format=FLOAT.name, grid="none", nbytes=FLOAT.nbytes(row.shape), digest=None)
