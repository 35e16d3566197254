"""`lfmc bench`: time a bundle on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lfmc.commands.options import json_option


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", type=int, help="Tokens of prefill. [default: 128, or half the context]")
@click.option("--tokens", type=int, help="Tokens of decode. [default: 64, or what is left]")
@click.option("--rounds", default=5, show_default=True, help="Rounds of both.")
@json_option
def command(
    bundle: Path, prompt: int | None, tokens: int | None, rounds: int, as_json: bool
) -> None:
    """Tokens per second of BUNDLE here: best and median of several rounds."""
    from lfmc.bundle.bundle import open_bundle
    from lfmc.errors import InputError

    open_bundle(bundle)

    from lfmc.api import load
    from lfmc.machine.progress import for_terminal
    from lfmc.run.timing import fitting, time_stepper

    progress = for_terminal()
    with progress.stage("load"):
        stepper = load(bundle)
    usual = fitting(stepper.context)
    prompt = usual[0] if prompt is None else prompt
    tokens = usual[1] if tokens is None else tokens
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
