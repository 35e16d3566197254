"""`lfmc plan`: choose bits and write them down, without exporting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfmc.commands.options import (
    alphaq_options,
    announce,
    force_option,
    json_option,
    measuring_options,
    model_argument,
    plan_options,
    report_option,
    require_absent,
    write_text,
)

if TYPE_CHECKING:
    from lfmc.calib_free.auto.method import Allocation


@click.command("plan")
@model_argument
@plan_options
@measuring_options
@click.option("--output", type=click.Path(path_type=Path), help="Where to write plan.json.")
@report_option
@force_option
@json_option
def command(
    model: str | None,
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
    output: Path | None,
    report: Path | None,
    force: bool,
    as_json: bool,
    **alphaq: Any,
) -> None:
    """Choose a format for every tensor of MODEL, for `lfmc export --plan` to obey.

    --report shows the plan: where the bytes go, bits by layer and by expert, spectra, error
    curves, and what other budgets would buy. It takes the spectrum of every matrix, so it takes
    longer.
    """
    from lfmc.api import budget
    from lfmc.calib_free.fit.fit import Effort
    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.commands.tables import console, plan_table
    from lfmc.errors import InputError
    from lfmc.exporter.export import plan_for
    from lfmc.lowering.request import Options
    from lfmc.machine.progress import for_terminal
    from lfmc.report.plan_facts import gather_plan
    from lfmc.report.plan_page import plan_page
    from lfmc.targets.base import get_target

    require_absent(output, force)
    require_absent(report, force)
    if report is not None and report == output:
        raise InputError("--output and --report name the same file", where=report)
    spent = Effort(effort, minutes, fit_device, gpus)
    if spent.level != "fast" and output is None:
        raise InputError(
            f"effort '{effort}' fits tensors that have to be kept",
            expected="--output plan.json",
            todo="name a file, or let `lfmc export` make the plan",
        )
    checkpoint, runs_on, progress = open_checkpoint(model), get_target(target), for_terminal()
    announce(checkpoint, model)
    options = Options(
        bits=bits,
        budget=budget(bits_per_weight, max_size),
        seed=seed,
        effort=spent,
        alphaq=alphaq_options(alphaq),
        workers=workers,
        cache=not no_cache,
    )
    seen: list[Allocation] = []
    plan = plan_for(checkpoint, runs_on, options, progress, seen.append)
    if output is not None:
        plan.save(output)
    if report is not None:
        capabilities = runs_on.capabilities(checkpoint.config)
        measured = seen[0].measured if seen else None
        with progress.stage("report"):
            facts = gather_plan(checkpoint, capabilities, plan, measured, progress.step)
        write_text(report, plan_page(facts))
    if as_json:
        click.echo(plan.to_json(), nl=False)
        return
    console().print(plan_table(plan, {}))
    if plan.predicted_kl is not None:
        click.echo(f"predicted KL on text that the model wrote itself: {plan.predicted_kl:.4f}")
    if output is not None:
        click.echo(f"plan: {output}")
    if report is not None:
        click.echo(f"report: {report}")
