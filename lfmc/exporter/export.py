"""Exports a checkpoint to a verified bundle: plan, trace, fuse, lower, verify and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfmc.bundle.bundle import (
    GOLDEN,
    MANIFEST,
    PLAN,
    Bundle,
    atomic_folder,
    open_bundle,
    write_json,
)
from lfmc.bundle.manifest import build_manifest
from lfmc.bundle.model_card import write_legal_files, write_model_card
from lfmc.bundle.token_ids import check_tokens
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.footprint import require_memory
from lfmc.checkpoint.tokenizer_files import add_settings, copy_tokenizer
from lfmc.errors import GateError
from lfmc.exporter.budget import lower_within_budget
from lfmc.graph.stored_codes import open_codes
from lfmc.lowering.build import BUILD_STAGES, Build
from lfmc.lowering.request import Options, make_request
from lfmc.machine.progress import Progress
from lfmc.passes.base import Applied
from lfmc.reference.transformers_model import is_available, require_reference
from lfmc.run.conversation import ReplayStepper
from lfmc.run.generate import golden_prompts
from lfmc.run.stepper import Stepper
from lfmc.run.timing import require_speed
from lfmc.targets.base import Artifact, Request, Target
from lfmc.verification.locate.search import find_place
from lfmc.verification.readback import READ_BACK_PARTS, read_back
from lfmc.verification.rungs import Verification, count_rungs, require_parity_memory, verify


@dataclass(frozen=True)
class Report:
    """The results of an export, for the printed table and for `--json`."""

    plan: BitPlan
    applied: tuple[Applied, ...]
    verification: Verification | None
    errors: Mapping[str, float]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        verification = self.verification
        quality = verification.quality if verification else None
        return {
            "bits_per_weight": self.plan.bits_per_weight,
            "plan_nbytes": self.plan.nbytes,
            "artifact_nbytes": self.nbytes,
            "limit_nbytes": self.plan.limit_nbytes,
            "passes": {step.name: step.changed for step in self.applied},
            "parity": [rung.to_dict() for rung in verification.rungs] if verification else None,
            "quality": asdict(quality) if quality else None,
            "measured_errors": dict(self.errors),
        }


def export(
    checkpoint: Checkpoint,
    target: Target,
    output: Path,
    options: Options,
    *,
    force: bool,
    progress: Progress,
) -> tuple[Bundle, Report]:
    """Plan, trace, fuse, lower, verify and write `output`; a failure leaves no files there.

    Raises `InputError` and `UnsupportedError` before any work if the request can't be met, and
    `GateError` if parity fails, or the budget or a limit of the options is not met.
    """
    request = make_request(checkpoint, target, options)
    _require_memory(checkpoint, target, options)
    if options.check != "off" and is_available():
        require_reference(checkpoint)
    progress.expect(_count_stages(target, request, options))
    with (
        open_codes(cache=options.cache) as codes,
        atomic_folder(output, force=force) as folder,
    ):
        other_files = [
            *copy_tokenizer(checkpoint, folder),
            *write_legal_files(checkpoint, folder),
        ]
        lowered = lower_within_budget(checkpoint, target, request, options, folder, progress, codes)
        plan, export_build, artifact = lowered.plan, lowered.build, lowered.artifact
        other_files += add_settings(folder, artifact.settings)
        verification, errors = None, {}
        if options.check != "off":
            with progress.stage("read the file back", READ_BACK_PARTS):
                errors = read_back(export_build, folder, artifact, progress.step)
            verification = _verify(export_build, folder, artifact, options, progress)
        report = Report(plan, lowered.applied, verification, errors, lowered.nbytes)
        with progress.stage("golden prompts and manifest"):
            write_json(folder / GOLDEN, _make_golden_prompts(export_build, folder))
            (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
            card = write_model_card(export_build, options, report.to_dict(), folder)
            other_files += [GOLDEN, PLAN, card, *artifact.beside]
            manifest = build_manifest(
                export_build, options, artifact, report.to_dict(), folder, other_files
            )
            write_json(folder / MANIFEST, manifest)
            check_tokens(open_bundle(folder), checkpoint)
    return open_bundle(output), report


def _count_stages(target: Target, request: Request, options: Options) -> int:
    """Return how many stages an export has, if no rung fails."""
    stages = 1 if options.plan is None else 0  # plan
    stages += BUILD_STAGES + 2  # lower; golden prompts and manifest
    if options.check != "off":
        stages += 1 + count_rungs(target, request)  # read the file back
        stages += options.min_speed is not None
    return stages


def _require_memory(checkpoint: Checkpoint, target: Target, options: Options) -> None:
    """Raise `UnsupportedError` if this machine has less memory than the peak of an export."""
    nbytes = target.export_nbytes(checkpoint.config, is_float=options.bits == "none")
    todo = "export it on a machine with more memory"
    require_memory(checkpoint, nbytes, "lowering", todo)
    if options.check != "off":
        require_parity_memory(checkpoint, "--check off leaves it out")


def _verify(
    export_build: Build, folder: Path, artifact: Artifact, options: Options, progress: Progress
) -> Verification:
    """Run the rungs and check every limit of the options.

    Raises `GateError` for the first rung or limit that fails; with `options.trace` the error
    contains the place.
    """
    verification = verify(export_build, folder, artifact, options.check, options.text, progress)
    place = find_place(export_build, verification, progress) if options.trace else None
    verification.require(place)
    _check_quality(verification, options)
    if options.min_speed is not None:
        with progress.stage("time"):
            require_speed(export_build.target.run(folder), options.min_speed)
    return verification


def _make_golden_prompts(export_build: Build, folder: Path) -> list[dict[str, Any]]:
    """Run the golden prompts on the artifact, or in torch if this machine can't execute it."""
    checkpoint, target = export_build.checkpoint, export_build.target
    request = export_build.request
    stepper: Stepper
    if target.why_not_here(request) is None:
        stepper = target.run(folder)
    else:
        reference = target.reference(export_build.program, request, folder, exact=False)
        stepper = ReplayStepper(reference, request.context)
    return golden_prompts(stepper, checkpoint.tokenizer(), checkpoint.config.bos_id)


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
