"""`lfmc init`: a first `.lfmc.toml`."""

from __future__ import annotations

from pathlib import Path

import click

from lfmc.commands.options import announce, force_option, model_argument, require_absent, write_text


@click.command("init")
@model_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path(".lfmc.toml"),
    show_default=True,
    help="File to write.",
)
@force_option
def command(model: str | None, output: Path, force: bool) -> None:
    """Look at MODEL and write a commented .lfmc.toml for it: a cell for every target.

    Targets that can't be exported on this machine are there as comments, with the reason.
    """
    from lfmc.check.scaffold import scaffold
    from lfmc.checkpoint import open_checkpoint

    require_absent(output, force)
    checkpoint = open_checkpoint(model)
    announce(checkpoint, model)
    write_text(output, scaffold(checkpoint, model))
    click.echo(f"{output}: look at it, then run lfmc check --accept")
