"""`lfmc verify`: verify an exported bundle again."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lfmc.commands.first_difference import showing_place
from lfmc.commands.options import adapter_option, json_option, text_option, trace_option
from lfmc.commands.param_types import CHECKS, FOLDER, Model, Word
from lfmc.commands.progress import progress_options, start_progress


@click.command("verify")
@click.argument("bundle", type=FOLDER)
@click.argument("model", required=False, type=Model())
@click.option(
    "--check",
    type=Word(*CHECKS[:2]),
    default="full",
    show_default=True,
    help="With MODEL. full: all parity cases. fast: two parity cases and a short text.",
)
@adapter_option
@text_option
@trace_option
@progress_options
@json_option
def command(
    bundle: Path,
    model: str | None,
    adapter: str | None,
    check: str,
    text: Path | None,
    trace: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Verify that BUNDLE's files are unchanged and that it still generates the same text.

    The check compares file hashes, and continues the golden prompts that the export stored. With
    MODEL, the command also reads the weights back from the files, compares them with the plan, and
    runs all four parity checks against MODEL.

    MODEL is the checkpoint that the bundle was exported from, or demo for the test model that
    ships with lfmc.
    """
    from lfmc.bundle.bundle import open_bundle
    from lfmc.errors import InputError, did_you_mean

    if trace and model is None:
        raise InputError("--trace needs the checkpoint to compare with", todo="add MODEL")
    if check not in ("full", "fast"):
        raise InputError(
            "there is no such check",
            expected="full, fast",
            got=check,
            todo=did_you_mean(check, CHECKS[:2]),
        )
    if adapter is not None and model is None:
        raise InputError("--adapter needs the checkpoint that it changes", todo="add MODEL")
    exported = open_bundle(bundle)
    progress = start_progress("verify", quiet=quiet, verbose=verbose)
    with progress.stage("load"):
        from lfmc.checkpoint.checkpoint import open_checkpoint

        checkpoint = None
        if model is not None:
            checkpoint = open_checkpoint(None if model == "demo" else model, adapter)

        from lfmc.exporter.reverify import reverify
    with showing_place(as_json):
        results = reverify(exported, checkpoint, progress, check, text, trace)
    if as_json:
        click.echo(json.dumps(results))
        return
    click.echo(f"files: {results['files']} unchanged")
    if "golden" in results:
        click.echo(f"golden prompts: {results['golden']} generate the same tokens as at export")
    else:
        click.echo(f"golden prompts: not run, {results['not_executed']}")
    for rung in results.get("parity", ()):
        state = rung["skipped"] or f"worst difference {rung['worst']:.1e}"
        click.echo(f"rung {rung['number']}: {rung['title']}: {state}")
    if "quality" in results:
        quality = results["quality"]
        click.echo(f"rung 4: KL {quality['kl']:.4f}, top-1 {100 * quality['top1']:.1f} %")
    if checkpoint is None:
        click.echo("add MODEL to compare weights and logits with the checkpoint")
