"""`lfmc init`: write a first `.lfmc.toml`."""

from __future__ import annotations

from pathlib import Path

import click

from lfmc.commands.options import force_option, require_absent, write_text
from lfmc.commands.param_types import PATH, Model
from lfmc.commands.progress import announce


@click.command("init")
@click.argument("models", nargs=-1, type=Model())
@click.option(
    "--output",
    type=PATH,
    default=Path(".lfmc.toml"),
    show_default=True,
    help="File to write.",
)
@force_option
def command(models: tuple[str, ...], output: Path, force: bool) -> None:
    """Write a commented .lfmc.toml, the configuration of `lfmc check`, with a cell per target.

    MODELS are checkpoint folders or Hugging Face ids. The default is every checkpoint in folders
    and subfolders beside the file, or else the test model that ships with lfmc. A target that
    can't be exported on this machine is written as a comment, with the reason.
    """
    from lfmc.check.config import DEMO
    from lfmc.check.scaffold import find_models, scaffold
    from lfmc.checkpoint.checkpoint import open_checkpoint

    require_absent(output, force)
    names = list(models) or find_models(output.parent) or [DEMO]
    checkpoints = {name: open_checkpoint(None if name == DEMO else name) for name in names}
    if not models and names == [DEMO]:
        announce(checkpoints[DEMO], None)
    write_text(output, scaffold(checkpoints))
    click.echo(f"{output}: {', '.join(names)}. Review it, then run lfmc check --accept")
