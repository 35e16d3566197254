"""Artifacts for tests: a checkpoint, formats of one's own choice, and everything on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lfmc.calib_free.grid.formats import GENERIC, Capabilities, Floats, Format
from lfmc.calib_free.grid.grid_search import PALETTE
from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.lowering.build import Build, build
from lfmc.lowering.request import Options, request
from lfmc.machine.progress import Silent
from lfmc.targets.base import Artifact, get_target

Choose = Callable[[PlanRow], Format | Floats]


@dataclass(frozen=True)
class Lowered(Build):
    """An artifact in a folder and what it was made from; the program is bound to its weights."""

    folder: Path
    artifact: Artifact

    def reference(self, *, exact: bool) -> torch.nn.Module:
        return self.target.reference(self.program, self.asked, self.folder, exact=exact)


def lower(
    checkpoint: Checkpoint,
    choose: Choose,
    folder: Path,
    *,
    name: str = "onnx",
    options: Mapping[str, str] | None = None,
    context: int = 96,
) -> Lowered:
    """Lower a checkpoint to a target with the format that `choose` gives each quantizable row."""
    target = get_target(name)
    plan = choose_formats(checkpoint, choose, target.capabilities(checkpoint.config))
    asked = request(checkpoint, target, Options(context=context, target_options=options or {}))
    made, _ = build(checkpoint, target, plan, asked, Silent())
    artifact = made.lower(folder)
    made.bind()
    return Lowered(checkpoint, made.weights, made.program, target, asked, folder, artifact)


def choose_formats(
    checkpoint: Checkpoint, choose: Choose, capabilities: Capabilities = GENERIC
) -> BitPlan:
    """A plan without a budget, whose quantizable rows have the formats that are chosen; some of
    the scales are negative, where the target takes such."""
    base = make_plan(checkpoint, GENERIC, "4", None)
    return replace(base, rows=tuple(_row(row, choose, capabilities) for row in base.rows))


def _row(row: PlanRow, choose: Choose, capabilities: Capabilities) -> PlanRow:
    if row.role not in ("embedding", "head", "linear", "expert"):
        own = Floats(row.format if row.format in capabilities.floats else "float32")
        return replace(row, format=own.name, nbytes=own.nbytes(row.shape))
    chosen = choose(row)
    grid = "none"
    if isinstance(chosen, Format):
        symmetric = "signed" if capabilities.negative_scales else "clip"
        grid = PALETTE if chosen.palette else symmetric if chosen.symmetric else "minmax"
    nbytes = capabilities.copies(row.role) * chosen.nbytes(row.shape)
    return replace(row, format=chosen.name, grid=grid, nbytes=nbytes)


def expert_of(row: PlanRow) -> int:
    """Which expert of its layer a row belongs to; 0 for a row of none."""
    _, found, rest = row.name.partition(".experts.")
    return int(rest.split(".")[0]) if found else 0


def four_bit(row: PlanRow) -> Format:
    return Format(4, 32, False, "float16")


def mixed(row: PlanRow) -> Format:
    """Experts of 2, 4 and 8 bits in turn, an 8-bit embedding, symmetric 4-bit matmuls."""
    if row.role == "expert":
        return Format((2, 4, 8)[expert_of(row) % 3], 32, False, "float16")
    bits = 8 if row.role in ("embedding", "head") else 4
    return Format(bits, 64, True, "float16")


def wide_groups(row: PlanRow) -> Format:
    """Groups that do not divide the rows of a tiny model's matmuls: padded tails."""
    return Format(4, 128 if row.role == "linear" else 32, False, "float16")


def two_bit(row: PlanRow) -> Format:
    return Format(2, 32, True, "float16")


def floats(row: PlanRow) -> Floats:
    return Floats("float32")
