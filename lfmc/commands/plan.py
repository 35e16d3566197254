"""`lfmc plan`: choose bits and write them down, without exporting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lfmc.commands.options import (
    alphaq_options,
    announce,
    json_option,
    model_argument,
    plan_options,
)


@click.command("plan")
@model_argument
@plan_options
@click.option("--output", type=click.Path(path_type=Path), help="Where to write plan.json.")
@click.option("--force", is_flag=True, help="Replace a plan that exists.")
@json_option
def command(
    model: str | None,
    target: str,
    bits: str | None,
    bits_per_weight: float | None,
    max_size: int | None,
    seed: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    **alphaq: Any,
) -> None:
    """Choose a format for every tensor of MODEL, for `lfmc export --plan` to obey."""
    from lfmc.api import budget
    from lfmc.checkpoint import open_checkpoint
    from lfmc.commands.tables import console, plan_table
    from lfmc.errors import InputError
    from lfmc.exporter import Options, plan_for
    from lfmc.progress import for_terminal
    from lfmc.targets.base import get_target

    if output is not None and output.exists() and not force:
        raise InputError("the output exists already", where=output, todo="--force replaces it")
    checkpoint = open_checkpoint(model)
    announce(checkpoint, model)
    options = Options(
        bits=bits,
        budget=budget(bits_per_weight, max_size),
        seed=seed,
        alphaq=alphaq_options(alphaq),
    )
    plan = plan_for(checkpoint, get_target(target), options, for_terminal())
    if output is not None:
        try:
            output.write_text(plan.to_json(), encoding="utf-8")
        except OSError as error:
            raise InputError("the plan can't be written", where=output, got=error) from error
    if as_json:
        click.echo(plan.to_json(), nl=False)
        return
    console().print(plan_table(plan, {}))
    if plan.predicted_kl is not None:
        click.echo(f"predicted KL on text that the model wrote itself: {plan.predicted_kl:.4f}")
    if output is not None:
        click.echo(f"plan: {output}")
