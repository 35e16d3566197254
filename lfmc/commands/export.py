"""`lfmc export`: from a checkpoint to a verified bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from lfmc.commands.first_difference import showing_place
from lfmc.commands.options import (
    Setting,
    alphaq_options,
    announce,
    json_option,
    measuring_options,
    model_argument,
    plan_options,
    text_option,
    trace_option,
)


@click.command("export")
@model_argument
@plan_options
@measuring_options
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Obey this plan.json.")
@click.option("--context", type=int, help="Longest conversation, in tokens. [default: 4096]")
@click.option(
    "-O",
    "--option",
    "target_options",
    type=Setting(),
    multiple=True,
    help="NAME=VALUE, an option of the target (`lfmc doctor` lists them). Repeatable.",
)
@click.option("--device", help="What the artifact is for, where a target has several: -O device=.")
@click.option("--soc", help="The chip that it is for, where a target has several: -O soc=.")
@click.option("--accelerator", help="The NPU that it is for: -O accelerator=.")
@click.option(
    "--isolated",
    is_flag=True,
    help="Run in an environment made for the target's packages, where they can't be in this one.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--check",
    default="full",
    show_default=True,
    help="full: the whole parity matrix. fast: two cases, little text. off: unproven.",
)
@click.option("--max-kl", type=float, help="Fail (exit 3) above this KL, nats per token.")
@click.option("--min-top1", type=float, help="Fail (exit 3) below this top-1 agreement, 0 to 1.")
@click.option("--min-speed", type=float, help="Fail (exit 3) below so many tokens/s of decode.")
@text_option
@trace_option
@click.option("--dry-run", is_flag=True, help="Plan only; write nothing.")
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
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
    plan_file: Path | None,
    context: int | None,
    target_options: tuple[tuple[str, str], ...],
    device: str | None,
    soc: str | None,
    accelerator: str | None,
    isolated: bool,
    output: Path | None,
    check: str,
    max_kl: float | None,
    min_top1: float | None,
    min_speed: float | None,
    trace: bool,
    text: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **alphaq: Any,
) -> None:
    """Quantize MODEL for a target, prove the result, and write one folder with all of it.

    \b
    lfmc export --target onnx --bits auto
    lfmc export ./LFM2-1.2B --bits-per-weight 4.5 --output lfm2-onnx
    lfmc export ./LFM2-2.6B --max-size 1.4GB --max-kl 0.05 -O layout=genai
    lfmc export ./LFM2-350M --target tvm --device cpu:avx2
    lfmc export ./LFM2-350M --target qualcomm --soc sm8750
    lfmc export ./model --target ethos-u --accelerator ethos-u85-256 --isolated
    """
    from lfmc.api import budget, default_output
    from lfmc.calib_free.fit.fit import Effort
    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.commands.tables import console, parity_table, plan_table, result_lines
    from lfmc.exporter.export import export, plan_for
    from lfmc.lowering.request import Options, request
    from lfmc.machine.isolated import run_isolated
    from lfmc.machine.progress import for_terminal
    from lfmc.targets.base import get_target

    chosen = get_target(target)
    if isolated:
        sys.exit(run_isolated(chosen.extra, sys.argv[1:]))
    checkpoint = open_checkpoint(model)
    announce(checkpoint, model)
    options = Options(
        bits=bits,
        budget=budget(bits_per_weight, max_size),
        plan=plan_file,
        context=context,
        target_options={
            **dict(target_options),
            **_given(device=device, soc=soc, accelerator=accelerator),
        },
        check=check,
        max_kl=max_kl,
        min_top1=min_top1,
        min_speed=min_speed,
        trace=trace,
        text=text,
        seed=seed,
        effort=Effort(effort, minutes, fit_device, gpus),
        alphaq=alphaq_options(alphaq),
        workers=workers,
        cache=not no_cache,
    )
    progress = for_terminal()
    out = console()
    if dry_run:
        request(checkpoint, chosen, options)
        plan = plan_for(checkpoint, chosen, options, progress)
        if as_json:
            click.echo(plan.to_json(), nl=False)
        else:
            out.print(plan_table(plan, {}))
            out.print("dry run: nothing was written")
        return
    folder = output or default_output(checkpoint, chosen)
    with showing_place(as_json):
        bundle, report = export(checkpoint, chosen, folder, options, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.path), **report.to_dict()}))
        return
    fused = ", ".join(f"{step.name} {step.changed}" for step in report.applied)
    out.print(f"passes: {fused}")
    checked = report.verification
    if checked is not None:
        out.print(parity_table(checked.rungs))
    quality = checked.quality if checked else None
    out.print(plan_table(report.plan, report.errors, result_lines(report, quality, text)))
    for trouble in bundle.manifest.get("known_troubles", ()):
        click.echo(f"note: {trouble['what']} ({trouble['link']})")
    click.echo(f"bundle: {bundle.path}")


def _given(**options: str | None) -> dict[str, str]:
    """Options of a target that have flags of their own, where they were given."""
    return {name: value for name, value in options.items() if value is not None}
