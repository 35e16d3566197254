"""Plans and lowers within a byte budget.

The size of a graph is known only after lowering; before, a target estimates it. If the artifact is
larger than the budget, or leaves more than `UNSPENT` of it unused, the formats are chosen again
with the size that was measured, and the artifact is lowered again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.auto.method import Allocation
from lfmc.calib_free.grid.formats import Capabilities, Format, parse_format
from lfmc.calib_free.make_plan import FAST, make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError
from lfmc.graph.stored_codes import StoredCodes
from lfmc.lowering.build import BUILD_STAGES, Build, build
from lfmc.lowering.request import Options
from lfmc.machine.cache import Cache, default_cache
from lfmc.machine.progress import Progress
from lfmc.machine.workers import open_workers
from lfmc.passes.base import Applied
from lfmc.targets.base import Artifact, Request, Target, choose_options

UNSPENT = 0.005  # of the budget
ROUNDS = 8
ADAPTIVE = ("auto", "alphaq")  # methods that can spend any number of bytes
# The counted steps of method "auto", in order: see `Progress.stage`.
AUTO_PARTS = ("text from the model", "sensitivity: forward", "sensitivity: backward")
LOWER_STAGES = BUILD_STAGES + 1


@dataclass(frozen=True)
class LoweredPlan:
    """An artifact in a folder, with the plan and the build that it was lowered from.

    `plan.graph_nbytes` is the size of the graph in the files, `nbytes` the size of all files.
    """

    plan: BitPlan
    build: Build
    applied: tuple[Applied, ...]
    artifact: Artifact
    nbytes: int

    @property
    def overshoot(self) -> int:
        """Bytes above the budget; negative if there is room left, 0 without a budget."""
        limit = self.plan.limit_nbytes
        return 0 if limit is None else self.nbytes - limit

    @property
    def spends_the_budget(self) -> bool:
        limit = self.plan.limit_nbytes
        return limit is None or -UNSPENT * limit <= self.overshoot <= 0


def plan_for(
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    progress: Progress,
    observe: Callable[[Allocation], None] = lambda allocation: None,
) -> BitPlan:
    """Load and check the plan of `options.plan`, or make a plan for the target's capabilities.

    `observe` is called with the measurements if method "auto" makes a new plan.
    """
    capabilities = _capabilities(checkpoint, target, options)
    if options.plan is not None:
        plan = BitPlan.load(options.plan)
        check_plan(plan, checkpoint, capabilities)
        return plan
    with _measurements(options) as cache:
        return _make_plan(checkpoint, target, options, progress, capabilities, cache, observe)


def lower_within_budget(
    checkpoint: Checkpoint,
    target: Target,
    request: Request,
    options: Options,
    folder: Path,
    progress: Progress,
    codes: StoredCodes,
) -> LoweredPlan:
    """Plan, trace, fuse and lower into `folder`, so that the files fit the budget and spend it.

    With an effort, the fine-tuning runs once, for the formats that fit. Raises `GateError` if the
    files do not contain the planned bytes, or if they do not fit after several rounds.
    """

    def lower(plan: BitPlan) -> LoweredPlan:
        return _lower(checkpoint, target, request, plan, folder, progress, codes)

    if options.plan is not None:
        return _require_fit(lower(plan_for(checkpoint, target, options, progress)))
    quick = replace(options, effort=FAST)
    capabilities = _capabilities(checkpoint, target, options)
    with _measurements(options) as cache:

        def choose(settings: Options) -> BitPlan:
            return _make_plan(checkpoint, target, settings, progress, capabilities, cache)

        lowered, too_large = lower(choose(quick)), 0  # rounds that did not fit
        for _ in range(ROUNDS - 1):
            is_final = lowered.plan.method not in ADAPTIVE or too_large > 0
            if lowered.spends_the_budget or (lowered.overshoot <= 0 and is_final):
                break
            reserve = lowered.plan.graph_nbytes
            if lowered.overshoot > 0:
                # A graph may grow with the number of formats, so every miss adds more.
                too_large += 1
                larger = capabilities.graph_nbytes + too_large * lowered.overshoot
                reserve = max(reserve, larger)
            capabilities = replace(capabilities, graph_nbytes=reserve)
            progress.expect_more(1)
            plan = choose(quick)
            if _formats(plan) == _formats(lowered.plan):
                if lowered.overshoot > 0:
                    continue  # the reserve is still too small to change a format
                break
            progress.expect_more(LOWER_STAGES)
            _remove(lowered, folder)
            lowered = lower(plan)
        _require_fit(lowered)
        if options.effort == FAST:
            return lowered
        progress.expect_more(1 + LOWER_STAGES)
        _remove(lowered, folder)
        return _require_fit(lower(choose(options)))


def _capabilities(checkpoint: Checkpoint, target: Target, options: Options) -> Capabilities:
    """Return what the target can store with the target options."""
    return target.capabilities(checkpoint.config, choose_options(target, options.target_options))


@contextmanager
def _measurements(options: Options) -> Iterator[Cache]:
    """Yield the user's cache, or one that lasts for this export, if the user wants none."""
    if options.cache:
        yield default_cache()
        return
    with tempfile.TemporaryDirectory(prefix="lfmc-") as folder:
        yield Cache(Path(folder))


def _make_plan(
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    progress: Progress,
    capabilities: Capabilities,
    cache: Cache,
    observe: Callable[[Allocation], None] = lambda allocation: None,
) -> BitPlan:
    parts = AUTO_PARTS if options.bits in (None, "auto") and options.effort == FAST else ()
    with progress.stage("plan", parts), open_workers(options.workers) as workers:
        return make_plan(
            checkpoint,
            capabilities,
            options.bits or "auto",
            options.budget,
            target=target.name,
            seed=options.seed,
            effort=options.effort,
            alphaq=options.alphaq,
            progress=progress.step,
            observe=observe,
            resources=Resources(workers, cache),
        )


def _lower(
    checkpoint: Checkpoint,
    target: Target,
    request: Request,
    plan: BitPlan,
    folder: Path,
    progress: Progress,
    codes: StoredCodes,
) -> LoweredPlan:
    export_build, applied = build(checkpoint, target, plan, request, progress, codes)
    with progress.stage("lower", ("tensor",)):
        artifact = export_build.lower(folder, progress.step)
    stored = sum(tensor.nbytes for tensor in artifact.tensors)
    _check_stored(plan, stored)
    nbytes = sum((folder / name).stat().st_size for name in artifact.files)
    plan = replace(plan, graph_nbytes=nbytes - stored)
    return LoweredPlan(plan, export_build, tuple(applied), artifact, nbytes)


def _remove(lowered: LoweredPlan, folder: Path) -> None:
    """Delete the files of an artifact that is lowered again."""
    for name in (*lowered.artifact.files, *lowered.artifact.beside):
        (folder / name).unlink()


def _formats(plan: BitPlan) -> list[tuple[str, str]]:
    return [(row.format, row.grid) for row in plan.rows]


def _check_stored(plan: BitPlan, stored: int) -> None:
    """Raise `GateError` unless the files contain the planned bytes of tensors.

    A plan pads rows of codes and zero points to whole bytes. A target either pads them too, or pads
    none of its tensors. Without padding, a stack of tensors may save part of a byte per tensor.
    """
    planned = sum(row.nbytes for row in plan.rows)
    formats = ((parse_format(row.format), row.shape) for row in plan.rows)
    padding = sum(form.padding_nbytes(shape) for form, shape in formats if isinstance(form, Format))
    dense = planned - padding
    if stored != planned and not dense - len(plan.rows) <= stored <= dense:
        raise GateError(
            "the artifact does not contain the planned number of bytes",
            expected=f"{planned} bytes of tensors",
            got=f"{stored} bytes",
            todo="this is a bug in lfmc; please report it",
        )


def _require_fit(lowered: LoweredPlan) -> LoweredPlan:
    """Return the argument; raise `GateError` if it is larger than its budget."""
    if lowered.overshoot > 0:
        raise GateError(
            "the artifact is larger than its budget",
            expected=f"at most {lowered.plan.limit_nbytes} bytes",
            got=f"{lowered.nbytes} bytes, {lowered.plan.graph_nbytes} of them for the graph",
            todo="raise the budget, or leave out --plan so that the formats are chosen to fit",
        )
    return lowered
