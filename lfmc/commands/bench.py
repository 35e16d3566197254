"""`lfmc bench`: time a bundle on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lfmc.commands.options import json_option


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", default=128, show_default=True, help="Tokens of prefill.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of decode.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of both.")
@json_option
def command(bundle: Path, prompt: int, tokens: int, rounds: int, as_json: bool) -> None:
    """Tokens per second of BUNDLE here: best and median of several rounds."""
    from lfmc.bundle import open_bundle
    from lfmc.errors import InputError

    open_bundle(bundle)

    from lfmc.api import load
    from lfmc.progress import for_terminal
    from lfmc.timing import time_stepper

    progress = for_terminal()
    with progress.stage("load"):
        stepper = load(bundle)
    if min(prompt, tokens, rounds) < 1 or prompt + tokens > stepper.context:
        raise InputError(
            "these sizes can't be timed",
            expected=f"at least 1 each, --prompt and --tokens at most {stepper.context} together",
            got=f"--prompt {prompt} --tokens {tokens} --rounds {rounds}",
        )
    with progress.stage("time"):
        timed = time_stepper(stepper, prompt, tokens, rounds)
    if as_json:
        click.echo(json.dumps({name: vars(rate) for name, rate in timed.items()}))
        return
    for name, rate in timed.items():
        click.echo(
            f"{name:8} {rate.best:9.1f} tokens/s best, {rate.median:9.1f} median of {rounds}"
        )
