"""`lfmc generate`: generate text with a bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lfmc.commands.options import json_option
from lfmc.commands.param_types import FOLDER
from lfmc.commands.progress import progress_options, start_progress
from lfmc.errors import InputError
from lfmc.machine.progress import write_stderr

STDIN = "-"
BUNDLE_DEFAULT = "[default: that of the bundle, or "


@click.command("generate")
@click.argument("bundle", type=FOLDER)
@click.argument("prompt")
@click.option("--max-tokens", default=64, show_default=True, help="Maximum number of new tokens.")
@click.option(
    "--raw",
    is_flag=True,
    help="Continue PROMPT as plain text, without the model's chat template.",
)
@click.option("--chat", is_flag=True, help="Require a chat template: fail if the bundle has none.")
@click.option("--system", metavar="TEXT", help="System message before PROMPT in the chat template.")
@click.option(
    "--temperature",
    type=float,
    help=f"Sampling temperature; 0 always takes the most likely token. {BUNDLE_DEFAULT}0]",
)
@click.option(
    "--top-k",
    type=int,
    help=f"Sample from this many of the most likely tokens. {BUNDLE_DEFAULT}all]",
)
@click.option(
    "--top-p",
    type=float,
    help="Sample from the most likely tokens that together have this probability. "
    f"{BUNDLE_DEFAULT}all]",
)
@click.option(
    "--min-p",
    type=float,
    help="Sample from tokens that are at least this many times as likely as the most likely one. "
    f"{BUNDLE_DEFAULT}all]",
)
@click.option(
    "--repetition-penalty",
    type=float,
    help=f"Above 1, tokens of the conversation become less likely. {BUNDLE_DEFAULT}1]",
)
@click.option("--seed", default=0, show_default=True, help="Random seed for sampling.")
@progress_options
@json_option
def command(
    bundle: Path,
    prompt: str,
    max_tokens: int,
    raw: bool,
    chat: bool,
    system: str | None,
    seed: int,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **sampling_settings: Any,
) -> None:
    """Answer PROMPT with the exported model in BUNDLE, run by its own runtime.

    If the bundle has a chat template, PROMPT is the user's message, and the answer is printed.
    Without a template, or with --raw, PROMPT is plain text: it is printed with its continuation.
    A PROMPT of - is read from stdin, without its last line break.

    The sampling options mean what they mean in transformers, and apply in the same order. The
    speed of prefill and decode is printed on stderr.

    \b
    lfmc generate BUNDLE "Why is the sky blue?"
    lfmc generate BUNDLE "Once upon a time" --raw --temperature 0.8 --top-p 0.95
    cat question.txt | lfmc generate BUNDLE - --system "Answer in one sentence."
    """
    from lfmc.bundle.bundle import open_bundle
    from lfmc.bundle.prompt import encode_prompt, stream_text, uses_template
    from lfmc.checkpoint.tokenizer import open_tokenizer

    opened = open_bundle(bundle)
    if max_tokens < 1:
        raise InputError("--max-tokens must be at least 1", got=max_tokens)
    template = uses_template(opened, raw=raw, chat=chat, system=system)
    if prompt == STDIN:
        prompt = _read_stdin()
    tokenizer = open_tokenizer(opened.path)
    ids = encode_prompt(opened, tokenizer, prompt, template=template, system=system)
    progress = start_progress("generate", quiet=quiet, verbose=verbose)
    with progress.stage("load"):
        from lfmc.api import load
        from lfmc.run.generate import continue_tokens
        from lfmc.run.sampling import choose_sampling
        from lfmc.run.timing import TimedStepper

        sampling = choose_sampling(opened.manifest.get("sampling"), **sampling_settings)
        stepper = TimedStepper(load(bundle))
    tokens: list[int] = []
    stop_ids = opened.manifest["tokens"]["stop"]
    new_tokens = continue_tokens(stepper, ids, max_tokens, stop_ids, sampling=sampling, seed=seed)
    pieces = stream_text(tokenizer, _record(new_tokens, tokens))
    if as_json:
        text = "".join(pieces)
    else:
        click.echo("" if template else prompt, nl=False)
        for piece in pieces:
            click.echo(piece, nl=False)  # it flushes: text appears while it is generated
        click.echo()
    end = "stop"
    if len(tokens) == max_tokens:
        end = "length"
    elif len(tokens) == stepper.context - len(ids):
        end = "context"
    if as_json:
        rates = {"prefill": stepper.prefill, "decode": stepper.decode}
        results = {"prompt": ids, "tokens": tokens, "text": text, "end": end}
        click.echo(json.dumps({**results, "tokens_per_second": rates}))
    if quiet:
        return
    if end == "context":
        write_stderr(
            f"the context of {stepper.context} tokens is full, so the text ends here; "
            "`lfmc export --context` exports a larger one"
        )
    write_stderr(
        f"prefill: {len(ids)} tokens, {_rate(stepper.prefill)}; "
        f"decode: {len(tokens)} tokens, {_rate(stepper.decode)}"
    )


def _read_stdin() -> str:
    """Return the text on stdin without its last line break, which `echo` adds."""
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise InputError("the prompt on stdin is empty")
    return text


def _record(tokens: Iterator[int], record: list[int]) -> Iterator[int]:
    """Yield the tokens, and append each of them to `record`."""
    for token in tokens:
        record.append(token)
        yield token


def _rate(tokens_per_second: float | None) -> str:
    return "-" if tokens_per_second is None else f"{tokens_per_second:.1f} tokens/s"
