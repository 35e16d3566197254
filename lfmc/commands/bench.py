"""`lfmc bench`: measure a bundle's speed on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lfmc.commands.options import json_option
from lfmc.commands.param_types import FOLDER
from lfmc.commands.progress import progress_options, start_progress


@click.command("bench")
@click.argument("bundle", type=FOLDER)
@click.option(
    "--prompt",
    type=int,
    help="Tokens to prefill. [default: 128, or half the context if it is shorter than 256]",
)
@click.option(
    "--tokens", type=int, help="Tokens to decode. [default: 64, or the rest of the context]"
)
@click.option("--rounds", default=5, show_default=True, help="Number of timed repetitions.")
@progress_options
@json_option
def command(
    bundle: Path,
    prompt: int | None,
    tokens: int | None,
    rounds: int,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Measure tokens per second of BUNDLE on this machine: the best round and the median."""
    from lfmc.bundle.bundle import open_bundle
    from lfmc.errors import InputError

    open_bundle(bundle)

    progress = start_progress("bench", quiet=quiet, verbose=verbose)
    with progress.stage("load"):
        from lfmc.api import load
        from lfmc.run.timing import default_lengths, time_stepper

        stepper = load(bundle)
    default_prompt, default_tokens = default_lengths(stepper.context)
    prompt = default_prompt if prompt is None else prompt
    tokens = default_tokens if tokens is None else tokens
    if min(prompt, tokens, rounds) < 1 or prompt + tokens > stepper.context:
        raise InputError(
            "--prompt, --tokens or --rounds is out of range",
            expected=f"at least 1 each; --prompt plus --tokens at most {stepper.context}",
            got=f"--prompt {prompt} --tokens {tokens} --rounds {rounds}",
        )
    progress.expect(1)
    with progress.stage("time", ("round",)):
        rates = time_stepper(stepper, prompt, tokens, rounds, progress.step)
    if as_json:
        click.echo(json.dumps({name: vars(rate) for name, rate in rates.items()}))
        return
    for name, rate in rates.items():
        click.echo(
            f"{name:8} {rate.best:9.1f} tokens/s best, {rate.median:9.1f} median of {rounds}"
        )
