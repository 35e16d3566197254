"""The pipeline from a checkpoint to a verified bundle, one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lfmc.bundle.bundle import GOLDEN, MANIFEST, PLAN, Bundle, open_bundle, write_json, writing
from lfmc.bundle.manifest import manifest
from lfmc.bundle.token_ids import check_tokens
from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.auto.method import Allocation
from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.checkpoint.chat_template import copy_tokenizer
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError
from lfmc.lowering.build import Build, build
from lfmc.lowering.request import Options, request
from lfmc.machine.cache import NOTHING, default_cache
from lfmc.machine.memory import require_memory
from lfmc.machine.progress import Progress
from lfmc.machine.workers import open_workers
from lfmc.passes.base import Applied
from lfmc.run.generate import golden_prompts
from lfmc.run.stepper import Stepper, TorchStepper
from lfmc.run.timing import require_speed
from lfmc.targets.base import Artifact, Target
from lfmc.verification.locate.search import find_place
from lfmc.verification.readback import read_back
from lfmc.verification.rungs import Verification, require_parity_memory, verify


@dataclass(frozen=True)
class Report:
    """What an export did, for the table at its end and for `--json`."""

    plan: BitPlan
    applied: tuple[Applied, ...]
    verification: Verification | None
    errors: Mapping[str, float]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        checked = self.verification
        return {
            "bits_per_weight": self.plan.bits_per_weight,
            "plan_nbytes": self.plan.nbytes,
            "artifact_nbytes": self.nbytes,
            "limit_nbytes": self.plan.limit_nbytes,
            "passes": {step.name: step.changed for step in self.applied},
            "parity": [rung.to_dict() for rung in checked.rungs] if checked else None,
            "quality": asdict(checked.quality) if checked and checked.quality else None,
            "measured_errors": dict(self.errors),
        }


def plan_for(
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    progress: Progress,
    observe: Callable[[Allocation], None] = lambda made: None,
) -> BitPlan:
    """The plan of a file, checked, or a new one made for the target's capabilities.

    `observe` is given what a new plan by "auto" measured.
    """
    capabilities = target.capabilities(checkpoint.config)
    if options.plan is None:
        cache = default_cache() if options.cache else NOTHING
        with progress.stage("plan"), open_workers(options.workers) as workers:
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
    plan = BitPlan.load(options.plan)
    check_plan(plan, checkpoint, capabilities)
    return plan


def export(
    checkpoint: Checkpoint,
    target: Target,
    output: Path,
    options: Options,
    *,
    force: bool,
    progress: Progress,
) -> tuple[Bundle, Report]:
    """Plan, trace, fuse, lower, verify and write `output`; nothing is left there on failure.

    Raises `InputError` and `UnsupportedError` before any work where the request can't be met, and
    `GateError` where parity, the budget, or a gate of the options is not.
    """
    asked = request(checkpoint, target, options)
    _require_memory(checkpoint, target, options)
    with writing(output, force=force) as folder:
        beside = copy_tokenizer(checkpoint, folder)
        plan = plan_for(checkpoint, target, options, progress)
        made, applied = build(checkpoint, target, plan, asked, progress)
        with progress.stage("lower"):
            artifact = made.lower(folder)
        nbytes = sum((folder / name).stat().st_size for name in artifact.files)
        _check_size(plan, artifact, nbytes)
        stored = sum(tensor.nbytes for tensor in artifact.tensors)
        plan = replace(plan, graph_nbytes=nbytes - stored)
        verification, errors = None, {}
        if options.check != "off":
            with progress.stage("read the file back"):
                errors = read_back(made, folder, artifact)
            verification = _prove(made, folder, artifact, options, progress)
        report = Report(plan, tuple(applied), verification, errors, nbytes)
        write_json(folder / GOLDEN, _golden(made, folder))
        (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
        beside += [GOLDEN, PLAN, *artifact.beside]
        write_json(
            folder / MANIFEST, manifest(made, options, artifact, report.to_dict(), folder, beside)
        )
        check_tokens(open_bundle(folder), checkpoint)
    return open_bundle(output), report


def _require_memory(checkpoint: Checkpoint, target: Target, options: Options) -> None:
    """Raise `UnsupportedError` where this machine has less than an export takes at its peak."""
    each = target.lowering_bytes * (2 if options.bits == "none" else 1)  # floats take twice
    needed = int(each * checkpoint.num_params)
    todo = "export it on a machine with more memory"
    require_memory(checkpoint.path, checkpoint.num_params, needed, "lowering", todo)
    if options.check != "off":
        require_parity_memory(checkpoint, "--check off leaves it out")


def _prove(
    made: Build, folder: Path, artifact: Artifact, options: Options, progress: Progress
) -> Verification:
    """Climb the rungs and hold the result to every gate; `GateError` for the first that is not met,
    with its place where the options ask for a trace."""
    verification = verify(made, folder, artifact, options.check, options.text, progress)
    verification.require(find_place(made, verification, progress) if options.trace else None)
    _check_quality(verification, options)
    if options.min_speed is not None:
        with progress.stage("time"):
            require_speed(made.target.run(folder), options.min_speed)
    return verification


def _golden(made: Build, folder: Path) -> list[dict[str, Any]]:
    """What the artifact continues the golden prompts with, or torch where it can't run here."""
    checkpoint, target, asked = made.checkpoint, made.target, made.asked
    stepper: Stepper
    if target.why_not_here(asked) is None:
        stepper = target.run(folder)
    else:
        made.bind()
        reference = target.reference(made.program, asked, folder, exact=False)
        stepper = TorchStepper(reference, checkpoint.config, asked.context)
    return golden_prompts(stepper, checkpoint.tokenizer(), checkpoint.config.bos_id)


def _check_size(plan: BitPlan, artifact: Artifact, nbytes: int) -> None:
    """The file holds what the plan says, and no more than the budget.

    A plan pads rows of codes and zero points to whole bytes. A target does so, too, or does without
    in all of its tensors; then a stack of several may save a part of a byte of each.
    """
    stored = sum(tensor.nbytes for tensor in artifact.tensors)
    planned = sum(row.nbytes for row in plan.rows)
    formats = ((parse_format(row.format), row.shape) for row in plan.rows)
    dense = planned - sum(f.padding(shape) for f, shape in formats if isinstance(f, Format))
    if stored != planned and not dense - len(plan.rows) <= stored <= dense:
        raise GateError(
            "the artifact does not hold the bytes that were planned",
            expected=f"{planned} bytes of tensors",
            got=f"{stored} bytes",
            todo="this is a fault of lfmc; please report it",
        )
    if plan.limit_nbytes is not None and nbytes > plan.limit_nbytes:
        raise GateError(
            "the artifact is larger than its budget",
            expected=f"at most {plan.limit_nbytes} bytes",
            got=f"{nbytes} bytes",
            todo="lfmc keeps too little room for the graph; please report it",
        )


def _check_quality(verification: Verification, options: Options) -> None:
    quality = verification.quality
    if quality is None:
        return
    if options.max_kl is not None and not quality.kl <= options.max_kl:
        raise GateError(
            "quantization changed the model more than allowed",
            expected=f"KL of at most {options.max_kl:g} nats per token (--max-kl)",
            got=f"{quality.kl:.4f}",
            todo="raise the budget, or the limit",
        )
    if options.min_top1 is not None and not quality.top1 >= options.min_top1:
        raise GateError(
            "the most likely token changed more often than allowed",
            expected=f"top-1 agreement of at least {options.min_top1:g} (--min-top1)",
            got=f"{quality.top1:.4f}",
            todo="raise the budget, or lower the limit",
        )
