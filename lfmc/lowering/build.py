"""An export before it is lowered: the fused program, the planned weights and the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.graph.stored_codes import StoredCodes
from lfmc.graph.trace import trace
from lfmc.machine.progress import Progress
from lfmc.parity.compare import Case, Rung, compare
from lfmc.passes.base import Applied, apply
from lfmc.passes.pipeline import pipeline
from lfmc.run.conversation import ConversationModel, SteppedModel
from lfmc.targets.base import Artifact, Request, Target

BUILD_STAGES = 2  # of `build`: trace, passes


@dataclass(frozen=True)
class Build:
    """The fused program and the planned weights, from which a target lowers an artifact.

    The program is bound to the weights.
    """

    checkpoint: Checkpoint
    weights: PlannedWeights
    program: Program
    target: Target
    request: Request

    @property
    def plan(self) -> BitPlan:
        return self.weights.plan

    def lower(
        self, folder: Path, progress: Callable[[str], None] = lambda detail: None
    ) -> Artifact:
        """Write the artifact into `folder`. `progress` receives a count of the tensors it reads."""
        weights = replace(self.weights, observe=_CountTensors(len(self.plan.rows), progress))
        return self.target.lower(self.program, weights, self.request, folder)

    def compare(
        self, title: str, folder: Path, matrix: Sequence[Case], *, exact: bool, near_tie: float
    ) -> Rung:
        """Run rung 3: the matrix on the artifact in `folder` and on the program in torch."""
        return compare(
            3,
            title,
            *self.open_models(folder, exact=exact),
            matrix,
            self.program.config.vocab_size,
            tolerance=self.tolerance(exact=exact),
            near_tie=near_tie,
        )

    def open_models(self, folder: Path, *, exact: bool) -> tuple[SteppedModel, ConversationModel]:
        """Open the artifact in `folder`, and the program with the runtime's rounding."""
        artifact = SteppedModel(self.target.run(folder, exact=exact))
        reference = self.target.reference(self.program, self.request, folder, exact=exact)
        return artifact, reference

    def tolerance(self, *, exact: bool) -> float | None:
        """Return the tolerance of rung 3; None if the difference is only reported."""
        return self.target.tolerance(self.program, exact=exact)


class _CountTensors:
    """Reports each tensor of the plan when a target reads it for the first time."""

    def __init__(self, total: int, progress: Callable[[str], None]) -> None:
        self._total, self._progress = total, progress
        self._names: set[str] = set()

    def __call__(self, name: str) -> None:
        if name not in self._names:
            self._names.add(name)
            self._progress(f"tensor {len(self._names)} of {self._total}")


def build(
    checkpoint: Checkpoint,
    target: Target,
    plan: BitPlan,
    request: Request,
    progress: Progress,
    codes: StoredCodes | None = None,
) -> tuple[Build, list[Applied]]:
    """Trace the decoder in the form that the target requires, and run the passes.

    Codes are read from `codes` and stored there, or in a temporary folder. Also returns what each
    pass changed.
    """
    with progress.stage("trace"):
        program = trace(checkpoint.config, target.trace_spec(checkpoint.config, request))
    with progress.stage("passes"):
        formats = {row.name: parse_format(row.format) for row in plan.rows}
        applied = apply(pipeline(formats), program)
    _check_coverage(plan, program)
    weights = PlannedWeights(checkpoint, plan, codes=codes or StoredCodes())
    program.bind(weights.value)
    return Build(checkpoint, weights, program, target, request), applied


def _check_coverage(plan: BitPlan, program: Program) -> None:
    """Raise `GateError` unless the graph quantizes exactly the tensors that the plan quantizes."""
    planned = {row.name for row in plan.rows if isinstance(parse_format(row.format), Format)}
    weights = [weight for weight in program.weights.values() if weight.part == "codes"]
    quantized = {source for weight in weights for source in weight.sources}
    if planned != quantized:
        raise GateError(
            "the graph and the plan disagree about what is quantized",
            where=", ".join(sorted(planned ^ quantized)[:4]),
            expected=f"{len(planned)} tensors",
            got=f"{len(quantized)}",
            todo="this is a bug in lfmc; please report it",
        )
