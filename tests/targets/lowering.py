"""Lower checkpoints for tests, with formats that the test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor

from lfmc.calib_free.grid.formats import GENERIC, Capabilities, Floats, Format
from lfmc.calib_free.grid.grid_search import PALETTE
from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.graph.program import Weight
from lfmc.lowering.build import Build, build
from lfmc.lowering.request import Options, make_request
from lfmc.machine.progress import Silent
from lfmc.parity.compare import Rung, cases, compare
from lfmc.reference.layerwise_program import LayerwiseProgram
from lfmc.run.conversation import ConversationModel, SteppedModel
from lfmc.run.stepper import Stepper
from lfmc.targets.base import Artifact, get_target
from tests.run_cache import RunCache

Choose = Callable[[PlanRow], Format | Floats]
CONTEXT = 96


@dataclass(frozen=True)
class Lowered(Build):
    """An artifact in a folder and its build."""

    folder: Path
    artifact: Artifact

    def reference(self, *, exact: bool) -> ConversationModel:
        return self.target.reference(self.program, self.request, self.folder, exact=exact)

    @property
    def in_torch(self) -> LayerwiseProgram:
        """The program in torch, with float activations."""
        return LayerwiseProgram(self.program, self.request.context)

    def run_matrix(
        self, stepper: Stepper, reference: ConversationModel, *, tolerance: float
    ) -> Rung:
        """Run the full parity matrix on a stepper over the artifact and on a reference."""
        config = self.checkpoint.config
        matrix = cases(config, self.request.context, full=True)
        model = SteppedModel(stepper)
        return compare(
            3, "artifact", model, reference, matrix, config.vocab_size, tolerance=tolerance
        )

    @contextmanager
    def changed_constant(self, suffix: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Change one constant of the program in torch, the first whose name ends in `suffix`."""
        wrong_name = next(name for name in self.program.weights if name.endswith(suffix))

        def value(name: str, weight: Weight) -> Tensor:
            tensor = self.weights.value(name, weight)
            return change(tensor) if name == wrong_name else tensor

        self.program.bind(value)
        try:
            yield
        finally:
            self.program.bind(self.weights.value)


def lower(
    checkpoint: Checkpoint,
    choose: Choose,
    folder: Path,
    *,
    name: str = "onnx",
    options: Mapping[str, str] | None = None,
    context: int = CONTEXT,
) -> Lowered:
    """Lower a checkpoint to a target; `choose` returns the format of each quantizable row."""
    export_build = build_for(checkpoint, choose, name, options or {}, context)
    return _lowered(export_build, folder, export_build.lower(folder))


def lower_once(export_build: Build, run_cache: RunCache) -> Lowered:
    """Lower a build once in a test run for the same target, request and plan."""
    key = (export_build.target.name, export_build.request, export_build.plan.to_json())
    folder, artifact = run_cache.make_once(key, export_build.lower)
    return _lowered(export_build, folder, artifact)


def build_for(
    checkpoint: Checkpoint,
    choose: Choose,
    name: str,
    options: Mapping[str, str],
    context: int = CONTEXT,
) -> Build:
    """Trace and fuse a checkpoint for a target, with the formats that `choose` returns."""
    target = get_target(name)
    plan = choose_formats(checkpoint, choose, target.capabilities(checkpoint.config, options))
    request = make_request(checkpoint, target, Options(context=context, target_options=options))
    return build(checkpoint, target, plan, request, Silent())[0]


def _lowered(export_build: Build, folder: Path, artifact: Artifact) -> Lowered:
    parts = (getattr(export_build, field.name) for field in fields(Build))
    return Lowered(*parts, folder, artifact)


def choose_formats(
    checkpoint: Checkpoint, choose: Choose, capabilities: Capabilities = GENERIC
) -> BitPlan:
    """Return a plan without a budget; `choose` returns the format of each quantizable row.

    Some scales are negative if the target supports negative scales.
    """
    base = make_plan(checkpoint, GENERIC, "4", None)
    return replace(base, rows=tuple(_row(row, choose, capabilities) for row in base.rows))


def _row(row: PlanRow, choose: Choose, capabilities: Capabilities) -> PlanRow:
    if row.role not in ("embedding", "head", "linear", "expert"):
        float_format = Floats(row.format if row.format in capabilities.floats else "float32")
        return replace(row, format=float_format.name, nbytes=float_format.nbytes(row.shape))
    tensor_format = choose(row)
    grid = "none"
    if isinstance(tensor_format, Format):
        symmetric = "signed" if capabilities.negative_scales else "clip"
        grid = (
            PALETTE if tensor_format.palette else symmetric if tensor_format.symmetric else "minmax"
        )
    nbytes = tensor_format.nbytes(row.shape)
    return replace(row, format=tensor_format.name, grid=grid, nbytes=nbytes)


def expert_of(row: PlanRow) -> int:
    """Return the index of a row's expert in its layer, or 0 if the row belongs to no expert."""
    _, separator, rest = row.name.partition(".experts.")
    return int(rest.split(".")[0]) if separator else 0


def four_bit(row: PlanRow) -> Format:
    return Format(4, 32, False, "float16")


def mixed(row: PlanRow) -> Format:
    """Experts of 2, 4 and 8 bits, an 8-bit embedding, symmetric 4-bit matmuls."""
    if row.role == "expert":
        return Format((2, 4, 8)[expert_of(row) % 3], 32, False, "float16")
    bits = 8 if row.role in ("embedding", "head") else 4
    return Format(bits, 64, True, "float16")


def wide_groups(row: PlanRow) -> Format:
    """Groups that do not divide the rows of a tiny model's matmuls, so the tails are padded."""
    return Format(4, 128 if row.role == "linear" else 32, False, "float16")


def two_bit(row: PlanRow) -> Format:
    return Format(2, 32, True, "float16")


def for_browsers(row: PlanRow) -> Format:
    """Formats of ONNX's layout for transformers.js: float32 scales, experts without zero points."""
    if row.role == "expert":
        return Format((4, 8)[expert_of(row) % 2], 32, True, "float32")
    bits = 8 if row.role in ("embedding", "head") else 4
    return Format(bits, 32, False, "float32")


def floats(row: PlanRow) -> Floats:
    return Floats("float32")
