"""Proving a finished bundle again, from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lfmc.bundle import GOLDEN, PLAN, Bundle
from lfmc.calib_free.plan import BitPlan
from lfmc.checkpoint import Checkpoint
from lfmc.errors import InputError
from lfmc.exporter import build_program
from lfmc.generate import check_golden
from lfmc.locate.bisect import Suspect
from lfmc.locate.search import find_place
from lfmc.memory import require_memory
from lfmc.progress import Progress
from lfmc.readback import read_back, stored_parts
from lfmc.rungs import PARITY_BYTES_PER_PARAM, Verification, verify
from lfmc.targets.base import Artifact, Probe, Request, StoredTensor, Target, get_target
from lfmc.tokens import check_tokens
from lfmc.weights import PlannedWeights


def reverify(
    bundle: Bundle,
    checkpoint: Checkpoint | None,
    progress: Progress,
    check: str = "full",
    text: Path | None = None,
    trace: bool = False,
) -> dict[str, Any]:
    """File hashes and golden prompts; with the checkpoint, codes on disk and all four rungs.

    What this machine can't execute is not, and `not_executed` says why. `text` and `trace` as in
    an export.

    Returns what was found; raises `GateError` for whatever does not hold, and `InputError` where
    `checkpoint` is not the one that the bundle was made from.
    """
    with progress.stage("files"):
        bundle.check_files()
        check_tokens(bundle, checkpoint)
    target = get_target(bundle.target)
    golden = bundle.read_json(GOLDEN)
    asked = Request(bundle.manifest["context"], bundle.manifest["options"])
    why_not_here = target.why_not_here(asked)
    found: dict[str, Any] = {"files": len(bundle.manifest["files"])}
    if why_not_here is None:
        with progress.stage("golden prompts"):
            check_golden(target.run(bundle.path), golden)
        found["golden"] = len(golden)
    else:
        found["not_executed"] = why_not_here
    if checkpoint is not None:
        suspect, verification = _against(bundle, checkpoint, target, asked, progress, check, text)
        place = find_place(suspect, verification, progress) if trace else None
        verification.require(place)
        found["parity"] = [rung.to_dict() for rung in verification.rungs]
        if verification.quality is not None:
            found["quality"] = vars(verification.quality)
    return found


def _against(
    bundle: Bundle,
    checkpoint: Checkpoint,
    target: Target,
    asked: Request,
    progress: Progress,
    check: str,
    text: Path | None,
) -> tuple[Suspect, Verification]:
    known = bundle.manifest["model"]["fingerprint"]
    if checkpoint.fingerprint != known:
        raise InputError(
            "the bundle was made from another checkpoint",
            where=checkpoint.path,
            expected=f"fingerprint {known[:16]}...",
            got=f"{checkpoint.fingerprint[:16]}...",
        )
    needed = PARITY_BYTES_PER_PARAM * checkpoint.num_params
    require_memory(checkpoint, needed, "parity", "leave MODEL out")
    plan, artifact = bundled_plan(bundle, checkpoint), _artifact(bundle.manifest)
    weights = PlannedWeights(checkpoint, plan)
    program, _ = build_program(checkpoint, target, plan, asked, progress)
    with progress.stage("read the file back"):
        read_back(weights, target, bundle.path, artifact)
    verification = verify(
        checkpoint,
        weights,
        program,
        target,
        bundle.path,
        artifact,
        asked,
        check,
        progress,
        target.why_not_here(asked),
        text,
    )
    return Suspect(checkpoint, weights, program, target, asked), verification


def bundled_plan(bundle: Bundle, checkpoint: Checkpoint) -> BitPlan:
    """The plan of a bundle; what was fitted is in the artifact and nowhere else, and the plan's
    digests say if it is right."""
    plan = BitPlan.from_json((bundle.path / PLAN).read_text(encoding="utf-8"))
    artifact, target = _artifact(bundle.manifest), get_target(bundle.target)
    fitted = stored_parts(target, bundle.path, artifact, checkpoint, plan.fitted_names)
    return replace(plan, fitted=fitted)


def _artifact(manifest: Mapping[str, Any]) -> Artifact:
    """The artifact as its manifest describes it."""
    return Artifact(
        tuple(manifest["artifact"]),
        tuple(StoredTensor(**{**t, "sources": tuple(t["sources"])}) for t in manifest["tensors"]),
        tuple(Probe(**{**p, "inputs": tuple(p["inputs"])}) for p in manifest["probes"]),
    )
