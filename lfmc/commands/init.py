"""`lfmc init`: a first `.lfmc.toml`."""

from __future__ import annotations

from pathlib import Path

import click

from lfmc.commands.options import announce, force_option, require_absent, write_text


@click.command("init")
@click.argument("models", nargs=-1)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path(".lfmc.toml"),
    show_default=True,
    help="File to write.",
)
@force_option
def command(models: tuple[str, ...], output: Path, force: bool) -> None:
    """Look at MODELS and write a commented .lfmc.toml for them: a cell for every target.

    Without MODELS, those in folders below the file's are taken. Targets that can't be exported on
    this machine are there as comments, with the reason.
    """
    from lfmc.check.config import DEMO
    from lfmc.check.scaffold import find_models, scaffold
    from lfmc.checkpoint.checkpoint import open_checkpoint

    require_absent(output, force)
    names = list(models) or find_models(output.parent) or [DEMO]
    opened = {name: open_checkpoint(None if name == DEMO else name) for name in names}
    if not models and names == [DEMO]:
        announce(opened[DEMO], None)
    write_text(output, scaffold(opened))
    click.echo(f"{output}: {', '.join(names)}. Look at it, then run lfmc check --accept")
