"""Efforts, and fitting the stored tensors of a plan to the float checkpoint."""

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

from lfmc.calib_free.auto.sampled_text import sample_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit.blocks import planned_kl
from lfmc.calib_free.fit.blockwise import block_nbytes, fit_blocks
from lfmc.calib_free.fit.distill import distill
from lfmc.calib_free.fit.multi_gpu import distill_multi_process, require_accelerate
from lfmc.calib_free.fit.student import BYTES_PER_PARAM
from lfmc.calib_free.fit.training_loop import TrainingOptions, TrainingSchedule
from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.calib_free.plan.bit_plan import FITTED, BitPlan, PlanRow
from lfmc.calib_free.plan.fitted_tensors import Parts, digest_parts
from lfmc.calib_free.plan.planned_tensors import stored_error
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.footprint import require_memory
from lfmc.errors import InputError, UnsupportedError
from lfmc.machine.cache import cache_folder
from lfmc.machine.memory import installed_nbytes

VALIDATION_TEXTS = 16  # not trained on; together with the training texts they fill whole batches


@dataclass(frozen=True)
class FitRecipe:
    """The training of an effort: the number and length of sampled texts, and two schedules.

    `blockwise` runs first; None leaves it out.
    """

    texts: int
    length: int
    blockwise: TrainingSchedule | None
    end_to_end: TrainingSchedule


RECIPES = {
    "best": FitRecipe(
        texts=496,
        length=128,
        blockwise=TrainingSchedule(steps=120, batch=16),
        end_to_end=TrainingSchedule(steps=120, batch=8, rate=0.5),
    ),
    "max": FitRecipe(
        texts=4080,
        length=256,
        blockwise=None,
        end_to_end=TrainingSchedule(steps=1500, batch=32),
    ),
}
GPUS = (1, 2, 4, 8)  # divisors of every batch size
BLOCKWISE_SHARE = 0.6  # of the minutes, if end-to-end training follows


@dataclass(frozen=True)
class Effort:
    """How much computation a plan may use. Raises `InputError` for invalid combinations.

    `level` "fast" only chooses formats. "best" also fits codes, scales and norms, within minutes on
    a few CPU cores. "max" fits them longer, on a GPU. `minutes` bounds the fitting. `device`,
    "cpu" or "cuda", runs the fitting and computes the spectra of method "alphaq". `gpus` is the
    number of GPUs that share the end-to-end training.
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
            raise InputError("minutes limit the fine-tuning, and effort 'fast' does none")
        if self.device not in ("cpu", "cuda"):
            raise InputError("there is no such device", expected="cpu, cuda", got=self.device)
        if self.gpus != 1 and (self.device != "cuda" or self.gpus not in GPUS):
            raise InputError(
                "this number of GPUs can't share the work",
                expected="1, 2, 4 or 8, with --fit-device cuda",
                got=f"{self.gpus} with --fit-device {self.device}",
            )


def require_effort(checkpoint: Checkpoint, method: str, effort: Effort) -> None:
    """Raise an error if this machine can't make a plan by `method` with this effort."""
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
    recipe = RECIPES[effort.level]
    if recipe.blockwise is None:
        needed = BYTES_PER_PARAM * checkpoint.num_params
    else:
        needed = block_nbytes(checkpoint, recipe.texts * recipe.length)
    task, todo = f"effort '{effort.level}'", "use a lower --effort here"
    require_memory(checkpoint, needed, task, todo, effort.device)


def fit_plan(
    checkpoint: Checkpoint, plan: BitPlan, effort: Effort, progress: Callable[[str], None]
) -> BitPlan:
    """Return the plan with codes, scales, zero points, norms and filters fitted to the checkpoint.

    "best" trains block by block, and then end to end if the whole model fits in memory; "max"
    trains only end to end, for longer. Formats and bytes do not change. Returns the plan with the
    least KL on validation text: the original plan or the plan after a stage. `progress` receives
    the KL of each of these plans. The state of a "max" training is saved in the cache, and the next
    call resumes from it. Call `require_effort` first: this function does not check the effort.
    """
    start, recipe = time.monotonic(), RECIPES[effort.level]
    stream = StreamedDecoder(checkpoint, effort.device)
    count, varied = recipe.texts + VALIDATION_TEXTS, recipe.texts // 2
    sample = sample_texts(stream, count, recipe.length, plan.seed, progress, varied)
    del stream
    texts, validation = sample[: recipe.texts], sample[recipe.texts :]
    best, least_kl = plan, planned_kl(checkpoint, plan, validation)
    progress(f"KL on validation text, before fitting: {least_kl:.4f}")
    for name, stage, share in _stages(checkpoint, recipe, effort):
        deadline = None if effort.minutes is None else start + 60 * effort.minutes * share
        state_path = _state_path(plan, recipe, effort) if effort.level == "max" else None
        options = TrainingOptions(plan.seed, progress, deadline, state_path)
        plan = with_fitted(plan, stage(checkpoint, plan, texts, options), name)
        if state_path is not None:
            state_path.unlink(missing_ok=True)
        kl = planned_kl(checkpoint, plan, validation)
        progress(f"KL on validation text, {name}: {kl:.4f}")
        if kl < least_kl:
            best, least_kl = plan, kl
    return replace(_with_errors(checkpoint, best), predicted_kl=least_kl)


Stage = Callable[[Checkpoint, BitPlan, Tensor, TrainingOptions], dict[str, Parts]]


def _state_path(plan: BitPlan, recipe: FitRecipe, effort: Effort) -> Path:
    """Return the file in the cache that stores the state of a training of exactly this plan."""
    key = f"{plan.to_json()}{recipe}{effort.device}"
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"training-{hashlib.sha256(key.encode()).hexdigest()[:32]}.pt"


def _stages(
    checkpoint: Checkpoint, recipe: FitRecipe, effort: Effort
) -> list[tuple[str, Stage, float]]:
    """Return the name, function, and end as a share of the time limit, of each stage."""
    stages: list[tuple[str, Stage, float]] = []
    fits_in_memory = BYTES_PER_PARAM * checkpoint.num_params <= installed_nbytes(effort.device)
    blockwise, end_to_end = recipe.blockwise, recipe.end_to_end
    if blockwise is not None:
        share = BLOCKWISE_SHARE if fits_in_memory else 1.0
        stages.append(("block by block", partial(fit_blocks, schedule=blockwise), share))
    if fits_in_memory:
        stage = partial(distill, schedule=end_to_end)
        if effort.gpus > 1:
            stage = partial(distill_multi_process, schedule=end_to_end, count=effort.gpus)
        stages.append(("end to end", stage, 1.0))
    return stages


def with_fitted(plan: BitPlan, fitted: dict[str, Parts], stage_name: str) -> BitPlan:
    """Return the plan with `fitted` tensors; the reasons of their rows name the stage."""
    rows = [
        replace(
            row, grid=FITTED, digest=digest_parts(fitted[row.name]), reason=_reason(row, stage_name)
        )
        if row.name in fitted
        else row
        for row in plan.rows
    ]
    return replace(plan, rows=tuple(rows), fitted={**plan.fitted, **fitted})


def _reason(row: PlanRow, stage_name: str) -> str:
    joint = "; then fitted " if row.digest is None else ", "
    return f"{row.reason}{joint}{stage_name}"


def _with_errors(checkpoint: Checkpoint, plan: BitPlan) -> BitPlan:
    """Return the plan with the errors of its fitted codes."""
    rows = []
    for row in plan.rows:
        if row.digest is not None and isinstance(parse_format(row.format), Format):
            row = replace(row, error=float(f"{stored_error(checkpoint, plan, row.name):.6g}"))
        rows.append(row)
    return replace(plan, rows=tuple(rows))
