"""Verifies a finished bundle from its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lfmc.bundle.bundle import GOLDEN, PLAN, Bundle
from lfmc.bundle.manifest import artifact_from_manifest
from lfmc.bundle.token_ids import check_tokens
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError
from lfmc.graph.stored_codes import open_codes
from lfmc.lowering.build import BUILD_STAGES, build
from lfmc.machine.progress import Progress
from lfmc.run.generate import check_golden
from lfmc.targets.base import Request, get_target
from lfmc.verification.locate.search import find_place
from lfmc.verification.readback import READ_BACK_PARTS, read_back, read_stored_parts
from lfmc.verification.rungs import count_rungs, require_parity_memory, verify


def reverify(
    bundle: Bundle,
    checkpoint: Checkpoint | None,
    progress: Progress,
    check: str = "full",
    text: Path | None = None,
    trace: bool = False,
) -> dict[str, Any]:
    """Check file hashes and golden prompts; with `checkpoint`, also the codes and all four rungs.

    If this machine can't execute the artifact, `not_executed` in the result is the reason. `text`
    and `trace` are as in an export.

    Returns the results. Raises `GateError` for a check that fails, and `InputError` if the bundle
    was made from another checkpoint.
    """
    target = get_target(bundle.target)
    request = Request(bundle.manifest["context"], bundle.manifest["options"])
    why_not_here = target.why_not_here(request)
    stages = 1 if why_not_here is not None else 2  # files; golden prompts
    if checkpoint is not None:
        stages += BUILD_STAGES + 1 + count_rungs(target, request)  # read the file back
    progress.expect(stages)
    with progress.stage("files"):
        bundle.check_files()
        check_tokens(bundle, checkpoint)
    golden = bundle.read_json(GOLDEN)
    results: dict[str, Any] = {"files": len(bundle.manifest["files"])}
    if why_not_here is None:
        with progress.stage("golden prompts"):
            check_golden(target.run(bundle.path), golden)
        results["golden"] = len(golden)
    else:
        results["not_executed"] = why_not_here
    if checkpoint is not None:
        _require_same_checkpoint(bundle, checkpoint)
        require_parity_memory(checkpoint, "leave MODEL out")
        plan = read_bundled_plan(bundle, checkpoint)
        artifact = artifact_from_manifest(bundle.manifest)
        with open_codes(cache=True) as codes:
            export_build, _ = build(checkpoint, target, plan, request, progress, codes)
            with progress.stage("read the file back", READ_BACK_PARTS):
                read_back(export_build, bundle.path, artifact, progress.step)
            verification = verify(export_build, bundle.path, artifact, check, text, progress)
            verification.require(
                find_place(export_build, verification, progress) if trace else None
            )
        results["parity"] = [rung.to_dict() for rung in verification.rungs]
        if verification.quality is not None:
            results["quality"] = vars(verification.quality)
    return results


def _require_same_checkpoint(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise `InputError` if the bundle was made from another checkpoint."""
    fingerprint = bundle.manifest["model"]["fingerprint"]
    if checkpoint.fingerprint != fingerprint:
        raise InputError(
            "the bundle was made from another checkpoint",
            where=checkpoint.path,
            expected=f"fingerprint {fingerprint[:16]}...",
            got=f"{checkpoint.fingerprint[:16]}...",
        )


def read_bundled_plan(bundle: Bundle, checkpoint: Checkpoint) -> BitPlan:
    """Read the plan of a bundle.

    Fitted tensors are stored only in the artifact, so they are read from there. The digests of the
    plan verify them.
    """
    plan = BitPlan.from_json((bundle.path / PLAN).read_text(encoding="utf-8"))
    artifact, target = artifact_from_manifest(bundle.manifest), get_target(bundle.target)
    fitted = read_stored_parts(target, bundle.path, artifact, checkpoint, plan.fitted_names)
    return replace(plan, fitted=fitted)
