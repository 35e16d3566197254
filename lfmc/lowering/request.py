"""What a user asks of an export; whatever can't be met is refused before any work is done."""

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
MIN_CONTEXT = 16  # the golden prompts and a few tokens


@dataclass(frozen=True)
class Options:
    """What a user asks of an export.

    `bits` None is "auto"; `plan` excludes `bits`, `budget` and `alphaq`, the knobs of "alphaq".
    `target_options` are choices for `Target.options`, by name. `text` is a file to judge on, in
    place of the passages that ship with lfmc; `min_speed` is in decoded tokens a second, here.
    With `trace` a rung that fails is traced to the first place that differs.
    `workers` (`dask://HOST:PORT`) measure for a new plan, this machine for None; with `cache`,
    what was measured before is used, and kept for the next plan. Neither changes a plan.
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
        """What has to be measured and met, by its flag."""
        all_of_them = {
            "--max-kl": self.max_kl,
            "--min-top1": self.min_top1,
            "--min-speed": self.min_speed,
        }
        return {name: value for name, value in all_of_them.items() if value is not None}


def request(checkpoint: Checkpoint, target: Target, options: Options) -> Request:
    """Context and options of an export; all of it is checked before any work is done.

    Raises `InputError` for what contradicts itself or can't be met, and `UnsupportedError` for
    what the target can't export.
    """
    _check_options(options)
    longest = checkpoint.config.max_context
    context = min(DEFAULT_CONTEXT, longest) if options.context is None else options.context
    if not min(MIN_CONTEXT, longest) <= context <= longest:
        raise InputError(
            "the context is outside of what the model was made for",
            expected=f"{min(MIN_CONTEXT, longest)} to {longest} tokens",
            got=context,
        )
    asked = Request(context, choose_options(target, options.target_options))
    target.check(checkpoint.config, asked)
    _check_executed(options, target.why_not_here(asked))
    return asked


def _check_options(options: Options) -> None:
    """Raise `InputError` for options that contradict each other or that could not be met."""
    if options.check not in CHECKS:
        raise InputError("there is no such check", expected=", ".join(CHECKS), got=options.check)
    for name, value in options.gates.items():
        highest = 1.0 if name == "--min-top1" else math.inf
        if not 0 <= value <= highest:
            raise InputError(f"{name} is out of range", expected=f"0 to {highest:g}", got=value)
        if options.check == "off":
            raise InputError(f"{name} needs a measurement, and --check off makes none")
    effort = None if options.effort == FAST else options.effort
    if options.text is not None and not options.text.is_file():
        raise InputError("there is no text to judge on", where=options.text, expected="a file")
    decided = (options.budget, options.bits, options.alphaq, effort)
    if options.plan is not None and any(part is not None for part in decided):
        raise InputError(
            "a plan already says what every tensor takes",
            where=options.plan,
            todo="leave out --bits, --bits-per-weight, --max-size, --effort and --alphaq-...",
        )


def _check_executed(options: Options, why_not_here: str | None) -> None:
    """Raise `InputError` for gates that only an execution can open."""
    for name in options.gates:
        if why_not_here is not None:
            raise InputError(
                f"{name} needs the artifact to be executed, and this machine can't",
                got=why_not_here,
            )
