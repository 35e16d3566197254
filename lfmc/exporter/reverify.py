"""Proving a finished bundle again, from its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lfmc.bundle.bundle import GOLDEN, PLAN, Bundle
from lfmc.bundle.manifest import described_artifact
from lfmc.bundle.token_ids import check_tokens
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError
from lfmc.lowering.build import build
from lfmc.machine.progress import Progress
from lfmc.run.generate import check_golden
from lfmc.targets.base import Request, get_target
from lfmc.verification.locate.search import find_place
from lfmc.verification.readback import read_back, stored_parts
from lfmc.verification.rungs import require_parity_memory, verify


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
        _require_same(bundle, checkpoint)
        require_parity_memory(checkpoint, "leave MODEL out")
        plan, artifact = bundled_plan(bundle, checkpoint), described_artifact(bundle.manifest)
        made, _ = build(checkpoint, target, plan, asked, progress)
        with progress.stage("read the file back"):
            read_back(made, bundle.path, artifact)
        verification = verify(made, bundle.path, artifact, check, text, progress)
        verification.require(find_place(made, verification, progress) if trace else None)
        found["parity"] = [rung.to_dict() for rung in verification.rungs]
        if verification.quality is not None:
            found["quality"] = vars(verification.quality)
    return found


def _require_same(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise `InputError` for another checkpoint than the bundle's."""
    known = bundle.manifest["model"]["fingerprint"]
    if checkpoint.fingerprint != known:
        raise InputError(
            "the bundle was made from another checkpoint",
            where=checkpoint.path,
            expected=f"fingerprint {known[:16]}...",
            got=f"{checkpoint.fingerprint[:16]}...",
        )


def bundled_plan(bundle: Bundle, checkpoint: Checkpoint) -> BitPlan:
    """The plan of a bundle; what was fitted is in the artifact and nowhere else, and the plan's
    digests say if it is right."""
    plan = BitPlan.from_json((bundle.path / PLAN).read_text(encoding="utf-8"))
    artifact, target = described_artifact(bundle.manifest), get_target(bundle.target)
    fitted = stored_parts(target, bundle.path, artifact, checkpoint, plan.fitted_names)
    return replace(plan, fitted=fitted)
