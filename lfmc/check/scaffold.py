"""A first `.lfmc.toml` for checkpoints: what `lfmc init` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from lfmc.check.config import BASELINE
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import LfmcError
from lfmc.lowering.request import DEFAULT_CONTEXT, Options, request
from lfmc.targets.base import get_target, install_advice, target_names

BITS = 4.5  # a budget that all targets can meet but those with wide weights alone


def find_models(folder: Path) -> list[str]:
    """Checkpoints in the folders of a folder, and in theirs: paths relative to it."""
    found = []
    for config in sorted((*folder.glob("*/config.json"), *folder.glob("*/*/config.json"))):
        try:
            open_checkpoint(config.parent)
        except LfmcError:  # a folder with something else
            continue
        found.append(config.parent.relative_to(folder).as_posix())
    return found


def scaffold(models: Mapping[str, Checkpoint]) -> str:
    """The text of a file for models by name: every target that can be exported here as a cell, the
    others as comments, with the reason."""
    checkpoints = list(models.values())
    context = min(DEFAULT_CONTEXT, *(own.config.max_context for own in checkpoints))
    names = [f'"{name}"' for name in models]
    head = _HEAD.format(
        baseline=BASELINE,
        models="\n".join(map(_told, checkpoints)),
        model=names[0] if len(names) == 1 else f"[{', '.join(names)}]",
        context=context,
        bits=BITS,
    )
    cells = [
        _cell(name, checkpoints[0], _why_not(name, checkpoints, context)) for name in target_names()
    ]
    return "\n".join([head, *cells])


def _told(checkpoint: Checkpoint) -> str:
    config, size = checkpoint.config, BITS * checkpoint.num_params / 8 / 1e6
    return (
        f"# {checkpoint.name}: {config.model_type}, {checkpoint.num_params:,} parameters, "
        f"{size:,.1f} MB at {BITS} bits, at most {config.max_context:,} tokens"
    )


def _why_not(name: str, checkpoints: Sequence[Checkpoint], context: int) -> str | None:
    """Why a target can't be exported here, and the remedy; None where it can."""
    target = get_target(name)
    try:
        for checkpoint in checkpoints:
            request(checkpoint, target, Options(context=context))
    except LfmcError as error:
        return ". ".join(str(part) for part in (error.what, error.got, error.todo) if part)
    missing = [package for package in target.packages if find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} is not installed here: {install_advice(target.extra)}"
    return None


def _cell(name: str, checkpoint: Checkpoint, why_not: str | None) -> str:
    target = get_target(name)
    lines = ["[[export]]", f'target = "{name}"']
    least = min(own.bits for own in target.capabilities(checkpoint.config).linear)
    if least > BITS:
        lines.append(f"bits-per-weight = {least + 1}  # its weights have {least} bits and scales")
    usual = ", ".join(f'"{option.name}={option.choices[0]}"' for option in target.options)
    if usual:
        lines.append(f"# option = [{usual}]")
    if why_not is not None:
        lines = [f"# {line}" for line in (f"{name}: {why_not}", *lines)]
    return "\n".join(lines) + "\n"


_HEAD = """\
# What `lfmc check` exports and proves, and which numbers have to hold.
# Every key is a flag of `lfmc export`, which `lfmc export --help` explains; `lfmc doctor` lists
# the choices for `option`, of which the defaults are shown.

baseline = "{baseline}"  # `lfmc check --accept` writes it; commit it

[drift]  # how much worse than the baseline a cell may be
kl = 0.05    # share of it
top1 = 0.01  # of all tokens
size = 0.01  # share of it

[defaults]  # of every cell; a cell's own keys come first
{models}
model = {model}
context = {context}
bits-per-weight = {bits}  # or max-size = "700MB"
check = "full"  # or "fast": fewer cases, less text
# max-kl = 0.1      # nats a token, against the float32 model
# min-top1 = 0.8    # share of tokens whose first choice stays
# min-speed = 20    # tokens a second of decode, on the machine that checks
# text = "eval.txt" # to judge on, in place of the passages that ship with lfmc
"""
