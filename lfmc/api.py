"""The Python API: what the commands do, as functions. All of it is in `lfmc` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfmc.bundle.bundle import Bundle, open_bundle
from lfmc.calib_free.allocate.budget import Budget
from lfmc.calib_free.alphaq.allocation import AlphaQOptions
from lfmc.calib_free.make_plan import FAST, Effort
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import InputError
from lfmc.machine.progress import Silent
from lfmc.run.stepper import Stepper
from lfmc.targets.base import Target, get_target


def budget(bits_per_weight: float | None, max_size: int | None) -> Budget | None:
    """A budget of what was given; None where nothing was."""
    if bits_per_weight is None and max_size is None:
        return None
    return Budget(bits_per_weight, max_size)


def default_output(checkpoint: Checkpoint, target: Target) -> Path:
    """`NAME-TARGET` in the current folder."""
    return Path(f"{checkpoint.name}-{target.name}")


def plan(
    model: str | Path | None = None,
    *,
    target: str = "onnx",
    bits: str | None = None,
    bits_per_weight: float | None = None,
    max_size: int | None = None,
    seed: int = 0,
    effort: Effort = FAST,
    alphaq: AlphaQOptions | None = None,
    workers: str | None = None,
    cache: bool = True,
) -> BitPlan:
    """A format for every tensor of a checkpoint; see `lfmc plan`. `max_size` is in bytes.

    `effort` is an `lfmc.Effort`: Effort("best", minutes=10) also fits codes, scales and norms.
    `workers` is the `dask://HOST:PORT` of a cluster that measures; `cache` keeps what was measured.
    """
    from lfmc.exporter.export import plan_for
    from lfmc.lowering.request import Options

    options = Options(
        bits=bits,
        budget=budget(bits_per_weight, max_size),
        seed=seed,
        effort=effort,
        alphaq=alphaq,
        workers=workers,
        cache=cache,
    )
    return plan_for(open_checkpoint(model), get_target(target), options, Silent())


def export(
    model: str | Path | None = None,
    *,
    target: str = "onnx",
    output: str | Path | None = None,
    force: bool = False,
    bits_per_weight: float | None = None,
    max_size: int | None = None,
    plan: str | Path | None = None,
    **options: Any,
) -> Bundle:
    """Quantize, lower, prove and write a bundle; see `lfmc export`.

    `plan` is the file of a plan to obey. `options` are those of `lfmc.lowering.request.Options`:
    bits, context, target_options (a dict), check, max_kl, min_top1, seed, effort, alphaq, workers,
    cache. Raises the same errors as the command.
    """
    from lfmc.exporter.export import export as run
    from lfmc.lowering.request import Options

    checkpoint, chosen = open_checkpoint(model), get_target(target)
    folder = default_output(checkpoint, chosen) if output is None else Path(output)
    asked = Options(
        budget=budget(bits_per_weight, max_size),
        plan=None if plan is None else Path(plan),
        **options,
    )
    bundle, _ = run(checkpoint, chosen, folder, asked, force=force, progress=Silent())
    return bundle


def verify(bundle: str | Path, model: str | Path | None = None) -> dict[str, Any]:
    """Prove a bundle again: files, golden prompts and, given its checkpoint, all rungs."""
    from lfmc.exporter.reverify import reverify

    return reverify(
        open_bundle(bundle), None if model is None else open_checkpoint(model), Silent()
    )


def load(bundle: str | Path) -> Stepper:
    """Run a bundle, whatever its target: `.reset()`, and `.step(tokens)` -> logits `[T, V]`."""
    opened = open_bundle(bundle)
    stepper = get_target(opened.target).run(opened.path)
    if stepper.context != opened.manifest["context"]:
        raise InputError(
            "the model and the manifest disagree about the context",
            where=opened.path,
            expected=opened.manifest["context"],
            got=stepper.context,
        )
    return stepper
