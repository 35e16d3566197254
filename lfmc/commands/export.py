"""`lfmc export`: quantize a checkpoint, export it and verify the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from lfmc.commands.first_difference import showing_place
from lfmc.commands.options import (
    adapter_option,
    alphaq_options,
    json_option,
    measuring_options,
    model_argument,
    plan_options,
    require_target,
    target_option,
    text_option,
    trace_option,
)
from lfmc.commands.param_types import CHECKS, PATH, Word
from lfmc.commands.progress import announce, announce_budget, progress_options, start_progress


@click.command("export")
@model_argument
@adapter_option
@plan_options
@measuring_options
@click.option(
    "--plan",
    "plan_file",
    type=PATH,
    help="Use the formats of this plan.json (from `lfmc plan`) instead of choosing them.",
)
@click.option(
    "--context",
    type=int,
    help="Maximum number of tokens, prompt included. [default: 4096, or the model's maximum]",
)
@target_option
@click.option(
    "--device", help="Device to compile for, such as cpu:avx2 with tvm. Same as -O device=VALUE."
)
@click.option(
    "--soc", help="Chip to compile for, such as sm8750 with qualcomm. Same as -O soc=VALUE."
)
@click.option(
    "--accelerator",
    help="NPU to compile for, such as ethos-u85-256 with ethos-u. Same as -O accelerator=VALUE.",
)
@click.option(
    "--isolated",
    is_flag=True,
    help="Run in a separate virtual environment, which lfmc creates, if the target's packages "
    "conflict with installed ones.",
)
@click.option(
    "--output",
    type=PATH,
    help="Folder to write. [default: NAME-TARGET in the current folder]",
)
@click.option(
    "--check",
    type=Word(*CHECKS),
    default="full",
    show_default=True,
    help="Verification of the exported model. full: all parity cases. fast: two parity cases and "
    "a short text. off: no verification.",
)
@click.option(
    "--max-kl",
    type=float,
    help="Fail (exit 3) if the KL divergence to the float32 model is above this, in nats per "
    "token.",
)
@click.option(
    "--min-top1",
    type=float,
    help="Fail (exit 3) if the most likely token is the float32 model's for a smaller fraction of "
    "tokens, 0 to 1.",
)
@click.option(
    "--min-speed",
    type=float,
    help="Fail (exit 3) if decode on this machine is slower, in tokens per second.",
)
@text_option
@trace_option
@click.option("--dry-run", is_flag=True, help="Print the plan; export nothing.")
@click.option("--force", is_flag=True, help="Overwrite an existing bundle.")
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
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **alphaq: Any,
) -> None:
    """Quantize MODEL and export it for a target, as a folder (a bundle).

    The bundle has the model files, tokenizer, plan, test prompts and a manifest. Unless --check is
    off, lfmc compares the exported model with the original before it keeps the bundle; it runs the
    exported model if this machine can.

    \b
    lfmc export --target onnx --bits auto
    lfmc export ./LFM2-1.2B --bits-per-weight 4.5 --output lfm2-onnx
    lfmc export ./LFM2-2.6B --max-size 1.4GB --max-kl 0.05 -O layout=genai
    lfmc export ./LFM2-350M --target tvm --device cpu:avx2
    lfmc export ./LFM2-350M --target qualcomm --soc sm8750
    lfmc export ./model --target ethos-u --accelerator ethos-u85-256 --isolated
    """
    require_target(target)
    progress = start_progress("export", quiet=quiet, verbose=verbose)
    with progress.stage("load"):
        from lfmc.checkpoint.checkpoint import open_checkpoint

        checkpoint = None if isolated else open_checkpoint(model, adapter)

        from lfmc.api import budget, default_output
        from lfmc.calib_free.fit.fit import Effort
        from lfmc.commands.tables import console, parity_table, plan_table, result_lines
        from lfmc.exporter.budget import plan_for
        from lfmc.exporter.export import export
        from lfmc.lowering.request import Options, make_request
        from lfmc.machine.isolated import run_isolated
        from lfmc.targets.base import get_target

        backend = get_target(target)
    if checkpoint is None:
        sys.exit(run_isolated(backend.extra, sys.argv[1:]))
    announce(checkpoint, model, quiet=quiet)
    options = Options(
        bits=bits,
        budget=budget(bits_per_weight, max_size),
        plan=plan_file,
        context=context,
        target_options={
            **dict(target_options),
            **_without_none(device=device, soc=soc, accelerator=accelerator),
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
    terminal = console()
    if dry_run:
        make_request(checkpoint, backend, options)
        progress.expect(1)
        plan = plan_for(checkpoint, backend, options, progress)
        announce_budget(plan, options.budget, quiet=quiet)
        if as_json:
            click.echo(plan.to_json(), nl=False)
        else:
            terminal.print(plan_table(plan, {}))
            terminal.print("dry run: nothing was written")
        return
    folder = output or default_output(checkpoint, backend)
    with showing_place(as_json):
        bundle, report = export(
            checkpoint, backend, folder, options, force=force, progress=progress
        )
    announce_budget(report.plan, options.budget, quiet=quiet)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.path), **report.to_dict()}))
        return
    pass_counts = ", ".join(f"{step.name} {step.changed}" for step in report.applied)
    terminal.print(f"passes: {pass_counts}")
    verification = report.verification
    if verification is not None:
        terminal.print(parity_table(verification.rungs))
    quality = verification.quality if verification else None
    terminal.print(plan_table(report.plan, report.errors, result_lines(report, quality, text)))
    for trouble in bundle.manifest.get("known_troubles", ()):
        click.echo(f"note: {trouble['what']} ({trouble['link']})")
    click.echo(f"bundle: {bundle.path}")


def _without_none(**options: str | None) -> dict[str, str]:
    """Return the options that are set."""
    return {name: value for name, value in options.items() if value is not None}
