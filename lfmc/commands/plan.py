"""`lfmc plan`: choose a format for every tensor and write the plan, without exporting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfmc.commands.options import (
    adapter_option,
    alphaq_options,
    force_option,
    json_option,
    measuring_options,
    model_argument,
    plan_options,
    report_option,
    require_absent,
    require_target,
    target_option,
    write_text,
)
from lfmc.commands.param_types import PATH
from lfmc.commands.progress import announce, announce_budget, progress_options, start_progress
from lfmc.errors import InputError

if TYPE_CHECKING:
    from lfmc.calib_free.auto.method import Allocation


@click.command("plan")
@model_argument
@adapter_option
@plan_options
@measuring_options
@target_option
@click.option("--output", type=PATH, help="File to write the plan to.")
@report_option
@force_option
@progress_options
@json_option
def command(
    model: str | None,
    adapter: str | None,
    target: str,
    bits: str | None,
    bits_per_weight: float | None,
    max_size: int | None,
    seed: int,
    effort: str,
    minutes: float | None,
    fit_device: str,
    gpus: int,
    workers: str | None,
    no_cache: bool,
    target_options: tuple[tuple[str, str], ...],
    output: Path | None,
    report: Path | None,
    force: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **alphaq: Any,
) -> None:
    """Choose a format for every tensor of MODEL and print the plan.

    --output writes the plan to a file, which `lfmc export --plan` reads.

    --report writes an HTML page with charts: bytes by part of the model, bits by layer and by
    expert, spectra, error curves, and the predicted quality at other budgets. It takes longer,
    because it computes the eigenvalues of every matrix.
    """
    require_target(target)
    require_absent(output, force)
    require_absent(report, force)
    if report is not None and report == output:
        raise InputError("--output and --report name the same file", where=report)
    progress = start_progress("plan", quiet=quiet, verbose=verbose)
    with progress.stage("load"):
        from lfmc.checkpoint.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(model, adapter)

        from lfmc.api import budget
        from lfmc.calib_free.fit.fit import Effort
        from lfmc.commands.tables import console, plan_table
        from lfmc.exporter.budget import plan_for
        from lfmc.lowering.request import Options
        from lfmc.report.plan_facts import gather_plan
        from lfmc.report.plan_page import plan_page
        from lfmc.targets.base import get_target

        fit_effort = Effort(effort, minutes, fit_device, gpus)
        if fit_effort.level != "fast" and output is None:
            raise InputError(
                f"effort '{effort}' needs a file to store the fine-tuned tensors",
                expected="--output plan.json",
                todo="add --output, or run `lfmc export`, which makes the plan itself",
            )
        backend = get_target(target)
    announce(checkpoint, model, quiet=quiet)
    options = Options(
        bits=bits,
        budget=budget(bits_per_weight, max_size),
        target_options=dict(target_options),
        seed=seed,
        effort=fit_effort,
        alphaq=alphaq_options(alphaq),
        workers=workers,
        cache=not no_cache,
    )
    allocations: list[Allocation] = []
    progress.expect(1 if report is None else 2)
    plan = plan_for(checkpoint, backend, options, progress, allocations.append)
    announce_budget(plan, options.budget, quiet=quiet)
    if output is not None:
        plan.save(output)
    if report is not None:
        capabilities = backend.capabilities(checkpoint.config, options.target_options)
        measured = allocations[0].matrix_costs if allocations else None
        with progress.stage("report"):
            facts = gather_plan(checkpoint, capabilities, plan, measured, progress.step)
        write_text(report, plan_page(facts))
    if as_json:
        click.echo(plan.to_json(), nl=False)
        return
    console().print(plan_table(plan, {}))
    if plan.predicted_kl is not None:
        click.echo(f"predicted KL, on text that the model generated: {plan.predicted_kl:.4f}")
    if output is not None:
        click.echo(f"plan: {output}")
    if report is not None:
        click.echo(f"report: {report}")
