"""What commands print to stderr besides errors: progress and notes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lfmc.machine.progress import Lines, Progress, Silent, write_stderr

if TYPE_CHECKING:
    from lfmc.calib_free.allocate.budget import Budget
    from lfmc.calib_free.plan.bit_plan import BitPlan
    from lfmc.checkpoint.checkpoint import Checkpoint

F = TypeVar("F", bound=Callable[..., Any])


def progress_options(function: F) -> F:
    """Add `--quiet` and `--verbose`."""
    quiet = click.option(
        "-q", "--quiet", is_flag=True, help="Print no progress and no notes on stderr, only errors."
    )
    verbose = click.option(
        "-v", "--verbose", is_flag=True, help="Print every step of the progress on stderr."
    )
    return quiet(verbose(function))


def start_progress(command: str, *, quiet: bool = False, verbose: bool = False) -> Progress:
    """Return the progress of a command, and show a first sign of it.

    Bars if stderr is a terminal, nothing if `quiet`, otherwise lines.
    """
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other.")
    if quiet:
        return Silent()
    if sys.stderr.isatty():
        from lfmc.machine.progress_bars import Bars, is_dumb_terminal

        if not is_dumb_terminal():
            return Bars(command, verbose=verbose)
    return Lines(command, verbose=verbose)


def announce(checkpoint: Checkpoint, model: str | None, *, quiet: bool = False) -> None:
    """Print a note to stderr if the bundled test model is used because no model is set."""
    if model is None and not quiet:
        write_stderr(
            f"no MODEL given: using {checkpoint.name}, which ships with lfmc "
            "(a tiny test model; its text is not meaningful)"
        )


def announce_budget(plan: BitPlan, budget: Budget | None, *, quiet: bool = False) -> None:
    """Print a note to stderr if a plan without a budget is larger than the default budget."""
    from lfmc.calib_free.make_plan import BUDGETED, DEFAULT_BITS_PER_WEIGHT

    if quiet or budget is not None or plan.method not in BUDGETED or plan.limit_nbytes is None:
        return
    least = 8 * plan.limit_nbytes / plan.num_params
    if least > DEFAULT_BITS_PER_WEIGHT:
        write_stderr(
            f"no budget given: {plan.target} needs {least:.2f} bits per weight for this model "
            f"(the default is {DEFAULT_BITS_PER_WEIGHT})"
        )
