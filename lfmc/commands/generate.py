"""`lfmc generate`: generate text with a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lfmc.commands.options import json_option


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-tokens", default=64, show_default=True, help="Maximum number of new tokens.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed for sampling.")
@click.option(
    "--chat",
    is_flag=True,
    help="Send PROMPT as a user message in the model's chat template, and print only the answer.",
)
@json_option
def command(
    bundle: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    chat: bool,
    as_json: bool,
) -> None:
    """Continue PROMPT with the exported model in BUNDLE, run by its own runtime."""
    from lfmc.bundle.bundle import open_bundle
    from lfmc.errors import InputError

    opened = open_bundle(bundle)

    from lfmc.api import load
    from lfmc.bundle.prompt import encode_prompt
    from lfmc.checkpoint.tokenizer import open_tokenizer
    from lfmc.machine.progress import terminal_progress
    from lfmc.run.generate import continue_tokens

    tokenizer = open_tokenizer(opened.path)
    ids = encode_prompt(opened, tokenizer, prompt, chat=chat)
    if max_tokens < 1 or temperature < 0:
        raise InputError("--max-tokens must be at least 1, and --temperature at least 0")
    with terminal_progress().stage("load"):
        stepper = load(bundle)
    stop_ids = opened.manifest["tokens"]["stop"]
    tokens = list(
        continue_tokens(stepper, ids, max_tokens, stop_ids, temperature=temperature, seed=seed)
    )
    continuation = tokenizer.decode(tokens)
    if as_json:
        click.echo(json.dumps({"prompt": ids, "tokens": tokens, "text": continuation}))
    else:
        click.echo(prompt + continuation if not chat else continuation)
