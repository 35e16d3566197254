"""What is exported, on its way: a fused program, the weights of a plan, and the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.graph.trace import trace
from lfmc.machine.progress import Progress
from lfmc.parity.compare import Case, Rung, compare
from lfmc.parity.expert_choices import ChoosingStepper
from lfmc.passes.base import Applied, apply
from lfmc.passes.pipeline import pipeline
from lfmc.run.stepper import Stepper
from lfmc.targets.base import Artifact, Request, Target


@dataclass(frozen=True)
class Build:
    """What an artifact is lowered from, and compared with."""

    checkpoint: Checkpoint
    weights: PlannedWeights
    program: Program
    target: Target
    asked: Request

    @property
    def plan(self) -> BitPlan:
        return self.weights.plan

    def lower(self, folder: Path) -> Artifact:
        """Write the artifact into `folder`."""
        return self.target.lower(self.program, self.weights, self.asked, folder)

    def bind(self) -> None:
        """Give the program the plan's weights, so that torch can run it."""
        self.program.bind(self.weights.value)

    def compare(
        self,
        title: str,
        folder: Path,
        matrix: Sequence[Case],
        progress: Progress,
        *,
        exact: bool,
        near_tie: float,
    ) -> Rung:
        """Rung 3: the matrix on the artifact in `folder`, and on the bound program in torch."""
        side, reference = self.sides(folder, exact=exact)
        return compare(
            3,
            title,
            side,
            reference,
            matrix,
            self.program.config.vocab_size,
            tolerance=self.tolerance(exact=exact),
            near_tie=near_tie,
            progress=progress.step,
        )

    def sides(self, folder: Path, *, exact: bool) -> tuple[Stepper, ChoosingStepper]:
        """The artifact in `folder`, and the bound program with the runtime's own roundings."""
        reference = self.target.reference(self.program, self.asked, folder, exact=exact)
        return (
            self.target.run(folder, exact=exact),
            ChoosingStepper(reference, self.program.config, self.asked.context),
        )

    def tolerance(self, *, exact: bool) -> float | None:
        """What both sides may differ by; None where that is only reported."""
        return self.target.tolerance(self.program, exact=exact)


def build(
    checkpoint: Checkpoint, target: Target, plan: BitPlan, asked: Request, progress: Progress
) -> tuple[Build, list[Applied]]:
    """Trace the decoder as the target wants it, and run the passes; these tell what they did."""
    with progress.stage("trace"):
        program = trace(checkpoint.config, target.trace_spec(checkpoint.config, asked))
    with progress.stage("passes"):
        formats = {row.name: parse_format(row.format) for row in plan.rows}
        applied = apply(pipeline(formats), program)
    _check_coverage(plan, program)
    return Build(checkpoint, PlannedWeights(checkpoint, plan), program, target, asked), applied


def _check_coverage(plan: BitPlan, program: Program) -> None:
    """Every tensor that the plan quantizes is quantized in the graph, and no other."""
    planned = {row.name for row in plan.rows if isinstance(parse_format(row.format), Format)}
    found = {s for w in program.weights.values() if w.part == "codes" for s in w.sources}
    if planned != found:
        raise GateError(
            "the graph and the plan disagree about what is quantized",
            where=", ".join(sorted(planned ^ found)[:4]),
            expected=f"{len(planned)} tensors",
            got=f"{len(found)}",
            todo="this is a fault of lfmc; please report it",
        )
