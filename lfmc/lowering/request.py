"""The options of an export, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lfmc.calib_free.alphaq.allocation import AlphaQOptions
from lfmc.calib_free.make_plan import FAST, Budget, Effort
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError
from lfmc.targets.base import Request, Target, choose_options

CHECKS = ("full", "fast", "off")
DEFAULT_CONTEXT = 4096
MIN_CONTEXT = 16  # room for the golden prompts and a few tokens


@dataclass(frozen=True)
class Options:
    """The options of an export.

    `bits` None means "auto". `plan` excludes `bits`, `budget` and `alphaq`; `alphaq` are the
    options of the method "alphaq". `target_options` are values for `Target.options`, by name.
    `text` is a file for rung 4, instead of the passages that ship with lfmc. `min_speed` is in
    decoded tokens a second on this machine. With `trace`, a failed rung is traced to the first
    place that differs. `workers` (`dask://HOST:PORT`) run the measurements for a new plan; None
    means this machine. With `cache`, measurements are read from and written to a cache. The
    workers and the cache do not change a plan.
    """

    bits: str | None = None
    budget: Budget | None = None
    plan: Path | None = None
    context: int | None = None
    target_options: Mapping[str, str] = field(default_factory=dict)
    check: str = "full"
    trace: bool = False
    max_kl: float | None = None
    min_top1: float | None = None
    min_speed: float | None = None
    text: Path | None = None
    seed: int = 0
    effort: Effort = FAST
    alphaq: AlphaQOptions | None = None
    workers: str | None = None
    cache: bool = True

    @property
    def gates(self) -> Mapping[str, float]:
        """The limits that the measurements must meet, by flag."""
        limits = {
            "--max-kl": self.max_kl,
            "--min-top1": self.min_top1,
            "--min-speed": self.min_speed,
        }
        return {name: value for name, value in limits.items() if value is not None}


def make_request(checkpoint: Checkpoint, target: Target, options: Options) -> Request:
    """Return the context and the target options of an export, checked.

    Raises `InputError` for options that contradict each other or can't be met, and
    `UnsupportedError` for a model that the target can't export.
    """
    _check_options(options)
    max_context = checkpoint.config.max_context
    context = min(DEFAULT_CONTEXT, max_context) if options.context is None else options.context
    if not min(MIN_CONTEXT, max_context) <= context <= max_context:
        raise InputError(
            "the context is outside of the range that the model supports",
            expected=f"{min(MIN_CONTEXT, max_context)} to {max_context} tokens",
            got=context,
        )
    request = Request(context, choose_options(target, options.target_options))
    target.check(checkpoint.config, request)
    _check_executed(options, target.why_not_here(request))
    return request


def _check_options(options: Options) -> None:
    """Raise `InputError` for options that contradict each other or can't be met."""
    if options.check not in CHECKS:
        raise InputError("there is no such check", expected=", ".join(CHECKS), got=options.check)
    for name, value in options.gates.items():
        maximum = 1.0 if name == "--min-top1" else math.inf
        if not 0 <= value <= maximum:
            raise InputError(f"{name} is out of range", expected=f"0 to {maximum:g}", got=value)
        if options.check == "off":
            raise InputError(f"{name} needs a measurement, and --check off makes none")
    effort = None if options.effort == FAST else options.effort
    if options.text is not None and not options.text.is_file():
        raise InputError(
            "the text for rung 4 does not exist", where=options.text, expected="a file"
        )
    plan_options = (options.budget, options.bits, options.alphaq, effort)
    if options.plan is not None and any(option is not None for option in plan_options):
        raise InputError(
            "a plan already sets the format of every tensor",
            where=options.plan,
            todo="leave out --bits, --bits-per-weight, --max-size, --effort and --alphaq-...",
        )


def _check_executed(options: Options, why_not_here: str | None) -> None:
    """Raise `InputError` for limits that require execution, if this machine can't execute."""
    for name in options.gates:
        if why_not_here is not None:
            raise InputError(
                f"{name} needs the artifact to be executed, and this machine can't",
                got=why_not_here,
            )
