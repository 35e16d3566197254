"""Efforts: how much computing a plan is worth, and fitting what it stores to the checkpoint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lfmc.calib_free.auto.sampled_text import write_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit.blocks import planned_kl
from lfmc.calib_free.fit.blockwise import block_nbytes, fit_blocks
from lfmc.calib_free.fit.distill import distill
from lfmc.calib_free.fit.multi_gpu import distill_together, require_accelerate
from lfmc.calib_free.fit.student import BYTES_PER_PARAM
from lfmc.calib_free.fit.training_loop import Course, Terms
from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.calib_free.plan.bit_plan import FITTED, BitPlan, PlanRow
from lfmc.calib_free.plan.fitted_tensors import Parts, digest
from lfmc.calib_free.plan.planned_tensors import stored_error
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError, UnsupportedError
from lfmc.machine.cache import cache_folder
from lfmc.machine.memory import installed_nbytes, require_memory

HELD_OUT = 16  # texts that nothing learns from; with the others they fill whole batches


@dataclass(frozen=True)
class Work:
    """What an effort does: on how many texts of its own of which length, what courses, in order."""

    texts: int
    length: int
    blocks: Course | None
    whole: Course


WORK = {
    "best": Work(496, 128, Course(steps=120, batch=16), Course(steps=120, batch=8, rate=0.5)),
    "max": Work(4080, 256, None, Course(steps=1500, batch=32)),
}
GPUS = (1, 2, 4, 8)  # they divide every batch
BLOCKS_SHARE = 0.6  # of the minutes, where both are to be done


@dataclass(frozen=True)
class Effort:
    """What a user is willing to spend; raises `InputError` for what makes no sense.

    `level` "fast" only chooses formats, "best" also fits codes, scales and norms within minutes on
    a few CPU cores, "max" does so at length on a GPU. `minutes` bounds the fitting. `device`,
    "cpu" or "cuda", is where it is done and where the spectra of method "alphaq" are taken; `gpus`
    of them share what is learned end to end.
    """

    LEVELS: ClassVar[tuple[str, ...]] = ("fast", "best", "max")

    level: str = "fast"
    minutes: float | None = None
    device: str = "cpu"
    gpus: int = 1

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
        if self.gpus != 1 and (self.device != "cuda" or self.gpus not in GPUS):
            raise InputError(
                "this number of GPUs can't share the work",
                expected="1, 2, 4 or 8, with --fit-device cuda",
                got=f"{self.gpus} with --fit-device {self.device}",
            )


def require_effort(checkpoint: Checkpoint, method: str, effort: Effort) -> None:
    """Raise, before any work, where a plan of `method` could not have this effort here."""
    if effort.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            "torch sees no CUDA device here",
            where=f"torch {torch.__version__}",
            todo="use --fit-device cpu, or install a CUDA build of torch",
        )
    if effort.level == "fast":
        if effort.device == "cuda" and method != "alphaq":
            raise InputError(
                f"effort 'fast' of method '{method}' has nothing to do on a GPU",
                todo="leave --fit-device out, or fit with --effort best or max",
            )
        return
    if method == "none":
        raise InputError("method 'none' quantizes nothing, so there is nothing to fit")
    if effort.gpus > 1:
        require_accelerate()
        if effort.gpus > torch.cuda.device_count():
            raise UnsupportedError(
                "torch sees fewer CUDA devices",
                expected=effort.gpus,
                got=torch.cuda.device_count(),
            )
    work = WORK[effort.level]
    if work.blocks is None:
        needed = BYTES_PER_PARAM * checkpoint.num_params
    else:
        needed = block_nbytes(checkpoint, work.texts * work.length)
    what, todo = f"effort '{effort.level}'", "use a lower --effort here"
    require_memory(checkpoint.path, checkpoint.num_params, needed, what, todo, effort.device)


def fit_plan(
    checkpoint: Checkpoint, plan: BitPlan, effort: Effort, progress: Callable[[str], None]
) -> BitPlan:
    """The plan with codes, scales, zero points, norms and filters fitted to the checkpoint.

    "best" fits block by block, then, where the model has the room to learn as a whole, for a while
    end to end; "max" does only that, for long. Formats and bytes stay. Of the plan as it was and
    what each of these made of it, the one of least KL on text that none has seen comes back;
    `progress` is told all of them. A "max" that was stopped goes on where it last saved itself in
    the cache. `require_effort` tells beforehand what can't be done.
    """
    started, work = time.monotonic(), WORK[effort.level]
    stream = StreamedDecoder(checkpoint, effort.device)
    count, varied = work.texts + HELD_OUT, work.texts // 2
    written = write_texts(stream, count, work.length, plan.seed, progress, varied)
    del stream
    texts, held_out = written[: work.texts], written[work.texts :]
    best, least = plan, planned_kl(checkpoint, plan, held_out)
    progress(f"KL on unseen text of its own, before fitting: {least:.4f}")
    made = plan
    for name, stage, share in _stages(checkpoint, work, effort):
        ends = None if effort.minutes is None else started + 60 * effort.minutes * share
        resume = _resume(made, work, effort) if effort.level == "max" else None
        terms = Terms(plan.seed, progress, ends, resume)
        made = with_fitted(made, stage(checkpoint, made, texts, terms), name)
        if resume is not None:
            resume.unlink(missing_ok=True)
        found = planned_kl(checkpoint, made, held_out)
        progress(f"KL on unseen text of its own, {name}: {found:.4f}")
        if found < least:
            best, least = made, found
    return replace(_with_errors(checkpoint, best), predicted_kl=least)


Stage = Callable[[Checkpoint, BitPlan, Tensor, Terms], dict[str, Parts]]


def _resume(plan: BitPlan, work: Work, effort: Effort) -> Path:
    """The file in the cache in which a training of this very plan is kept while it runs."""
    what = f"{plan.to_json()}{work}{effort.device}"
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"training-{hashlib.sha256(what.encode()).hexdigest()[:32]}.pt"


def _stages(checkpoint: Checkpoint, work: Work, effort: Effort) -> list[tuple[str, Stage, float]]:
    """Name, function, and the share of the time that has passed at its end, of each stage."""
    stages: list[tuple[str, Stage, float]] = []
    whole = BYTES_PER_PARAM * checkpoint.num_params <= installed_nbytes(effort.device)
    blocks = work.blocks
    if blocks is not None:
        share = BLOCKS_SHARE if whole else 1.0
        stages.append(("block by block", partial(fit_blocks, course=blocks), share))
    if whole:
        together = partial(distill_together, course=work.whole, count=effort.gpus)
        alone = partial(distill, course=work.whole)
        stages.append(("end to end", alone if effort.gpus == 1 else together, 1.0))
    return stages


def with_fitted(plan: BitPlan, fitted: dict[str, Parts], how: str) -> BitPlan:
    """The plan with these tensors in place of what its rows would make; reasons say `how`."""
    rows = [
        replace(row, grid=FITTED, digest=digest(fitted[row.name]), reason=_reason(row, how))
        if row.name in fitted
        else row
        for row in plan.rows
    ]
    return replace(plan, rows=tuple(rows), fitted={**plan.fitted, **fitted})


def _reason(row: PlanRow, how: str) -> str:
    return f"{row.reason}; then fitted {how}" if row.digest is None else f"{row.reason}, {how}"


def _with_errors(checkpoint: Checkpoint, plan: BitPlan) -> BitPlan:
    """The plan with the errors of its fitted codes."""
    rows = []
    for row in plan.rows:
        if row.digest is not None and isinstance(parse_format(row.format), Format):
            row = replace(row, error=float(f"{stored_error(checkpoint, plan, row.name):.6g}"))
        rows.append(row)
    return replace(plan, rows=tuple(rows))
