"""`lfmc verify`: prove a bundle again."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lfmc.commands.first_difference import showing_place
from lfmc.commands.options import json_option, text_option, trace_option


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option("--check", default="full", show_default=True, help="full or fast.")
@text_option
@trace_option
@json_option
def command(
    bundle: Path, model: str | None, check: str, text: Path | None, trace: bool, as_json: bool
) -> None:
    """Check BUNDLE's files and golden prompts; with MODEL, its weights and all four parity rungs.

    MODEL is the checkpoint that the bundle was exported from (`demo` for the one in the package).
    """
    from lfmc.bundle.bundle import open_bundle
    from lfmc.errors import InputError

    if trace and model is None:
        raise InputError("--trace compares with the checkpoint", todo="give MODEL as well")
    if check not in ("full", "fast"):
        raise InputError("there is no such check", expected="full, fast", got=check)
    opened = open_bundle(bundle)

    from lfmc.checkpoint.checkpoint import open_checkpoint
    from lfmc.exporter.reverify import reverify
    from lfmc.machine.progress import for_terminal

    checkpoint = None
    if model is not None:
        checkpoint = open_checkpoint(None if model == "demo" else model)
    with showing_place(as_json):
        found = reverify(opened, checkpoint, for_terminal(), check, text, trace)
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"files: {found['files']} unchanged")
    if "golden" in found:
        click.echo(f"golden prompts: {found['golden']} continue as when they were exported")
    else:
        click.echo(f"golden prompts: not run, {found['not_executed']}")
    for rung in found.get("parity", ()):
        state = rung["skipped"] or f"worst difference {rung['worst']:.1e}"
        click.echo(f"rung {rung['number']}: {rung['title']}: {state}")
    if "quality" in found:
        quality = found["quality"]
        click.echo(f"rung 4: KL {quality['kl']:.4f}, top-1 {100 * quality['top1']:.1f} %")
    if checkpoint is None:
        click.echo("give MODEL as well to compare weights and logits with the checkpoint")
