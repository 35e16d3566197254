"""Efforts: how much computing a plan is worth, and fitting what it stores to the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lfmc.calib_free.distill import BYTES_PER_PARAM, distill
from lfmc.calib_free.fitted import Parts, digest
from lfmc.calib_free.formats import Format, parse_format
from lfmc.calib_free.plan import FITTED, BitPlan, PlanRow, stored_error
from lfmc.calib_free.training import Course, Terms
from lfmc.checkpoint import Checkpoint
from lfmc.errors import InputError, UnsupportedError
from lfmc.memory import require_memory

COURSES = {
    "best": Course(steps=400, batch=8, texts=640, length=128),
    "max": Course(steps=1500, batch=32, texts=4096, length=256),
}


@dataclass(frozen=True)
class Effort:
    """What a user is willing to spend; raises `InputError` for what makes no sense.

    `level` "fast" only chooses formats, "best" also fits codes, scales and norms within minutes on
    a few CPU cores, "max" does so at length on a GPU. `minutes` bounds the fitting; `device` is
    "cpu" or "cuda".
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("fast", "best", "max")

    level: str = "fast"
    minutes: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.level not in self.LEVELS:
            expected = ", ".join(self.LEVELS)
            raise InputError("there is no such effort", expected=expected, got=repr(self.level))
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise InputError("minutes must be a positive number", got=self.minutes)
        if self.minutes is not None and self.level == "fast":
            raise InputError("effort 'fast' does no fitting that minutes could bound")
        if self.device not in ("cpu", "cuda"):
            raise InputError("there is no such device", expected="cpu, cuda", got=self.device)


def require_fitting(checkpoint: Checkpoint, method: str, effort: Effort) -> None:
    """Raise, before any work, where a plan of `method` could not be fitted here."""
    if method == "none":
        raise InputError("method 'none' quantizes nothing, so there is nothing to fit")
    if effort.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            "torch sees no CUDA device here",
            where=f"torch {torch.__version__}",
            todo="use --device cpu, or install a CUDA build of torch",
        )
    require_memory(
        checkpoint, BYTES_PER_PARAM, f"effort '{effort.level}'", "use --effort fast here"
    )


def fit_plan(
    checkpoint: Checkpoint,
    plan: BitPlan,
    effort: Effort,
    course: Course,
    progress: Callable[[str], None],
) -> BitPlan:
    """The plan with codes, scales, zero points, norms and filters fitted to the checkpoint.

    Formats and bytes stay. Where fitting did not lower the KL on text that it had not seen, the
    plan comes back as it was, and says so in `progress`. `require_fitting` tells beforehand
    whether it can be done.
    """
    ends = None if effort.minutes is None else time.monotonic() + 60 * effort.minutes
    made = distill(checkpoint, plan, course, effort.device, Terms(plan.seed, progress, ends))
    if made.kl_after >= made.kl_before:
        progress(f"fitting did not help (KL {made.kl_before:.4f}): the plan stays as it was")
        return replace(plan, predicted_kl=made.kl_before)
    fitted = replace(plan, fitted=made.fitted, rows=tuple(_rows(plan, made.fitted)))
    errors = {
        row.name: stored_error(checkpoint, fitted, row.name)
        for row in fitted.rows
        if isinstance(parse_format(row.format), Format)
    }
    rows = (replace(r, error=float(f"{errors.get(r.name, r.error):.6g}")) for r in fitted.rows)
    return replace(fitted, rows=tuple(rows), predicted_kl=made.kl_after)


def _rows(plan: BitPlan, fitted: dict[str, Parts]) -> list[PlanRow]:
    """Rows that name the parts of what was fitted."""
    return [
        replace(
            row, grid=FITTED, digest=digest(fitted[row.name]), reason=f"{row.reason}; then fitted"
        )
        if row.name in fitted
        else row
        for row in plan.rows
    ]
