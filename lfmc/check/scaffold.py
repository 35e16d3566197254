"""Generate a first `.lfmc.toml` for `lfmc init`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from lfmc.check.config import BASELINE
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import LfmcError
from lfmc.lowering.request import DEFAULT_CONTEXT, Options, make_request
from lfmc.targets.base import get_target, install_advice, target_names

BITS_PER_WEIGHT = 4.5  # targets can meet this budget, unless they support only wide weights


def find_models(folder: Path) -> list[str]:
    """Return the checkpoints one or two levels below a folder, as paths relative to it."""
    names = []
    for config in sorted((*folder.glob("*/config.json"), *folder.glob("*/*/config.json"))):
        try:
            open_checkpoint(config.parent)
        except LfmcError:  # the folder has another kind of model
            continue
        names.append(config.parent.relative_to(folder).as_posix())
    return names


def scaffold(models: Mapping[str, Checkpoint]) -> str:
    """Return the text of a `.lfmc.toml` with a cell per target, for models by name.

    A target that can't be exported on this machine is a comment with the reason.
    """
    checkpoints = list(models.values())
    context = min(DEFAULT_CONTEXT, *(checkpoint.config.max_context for checkpoint in checkpoints))
    names = [f'"{name}"' for name in models]
    head = _HEAD.format(
        baseline=BASELINE,
        models="\n".join(map(_checkpoint_comment, checkpoints)),
        model=names[0] if len(names) == 1 else f"[{', '.join(names)}]",
        context=context,
        bits=BITS_PER_WEIGHT,
    )
    cells = [
        _export_table(name, checkpoints[0], _obstacle(name, checkpoints, context))
        for name in target_names()
    ]
    return "\n".join([head, *cells])


def _checkpoint_comment(checkpoint: Checkpoint) -> str:
    config, size = checkpoint.config, BITS_PER_WEIGHT * checkpoint.num_params / 8 / 1e6
    return (
        f"# {checkpoint.name}: {config.model_type}, {checkpoint.num_params:,} parameters, "
        f"{size:,.1f} MB at {BITS_PER_WEIGHT} bits, at most {config.max_context:,} tokens"
    )


def _obstacle(name: str, checkpoints: Sequence[Checkpoint], context: int) -> str | None:
    """Return why this machine can't export a target, with the remedy; None if it can."""
    target = get_target(name)
    try:
        for checkpoint in checkpoints:
            make_request(checkpoint, target, Options(context=context))
    except LfmcError as error:
        return ". ".join(str(part) for part in (error.what, error.got, error.todo) if part)
    missing = [package for package in target.packages if find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} is not installed here: {install_advice(target.extra)}"
    return None


def _export_table(name: str, checkpoint: Checkpoint, obstacle: str | None) -> str:
    """Return the `[[export]]` table of a target, commented out if there is an obstacle."""
    target = get_target(name)
    lines = ["[[export]]", f'target = "{name}"']
    narrowest = min(stored.bits for stored in target.capabilities(checkpoint.config, {}).linear)
    if narrowest > BITS_PER_WEIGHT:
        comment = f"its weights have at least {narrowest} bits, plus scales"
        lines.append(f"bits-per-weight = {narrowest + 1}  # {comment}")
    defaults = ", ".join(f'"{option.name}={option.choices[0]}"' for option in target.options)
    if defaults:
        lines.append(f"# option = [{defaults}]")
    if obstacle is not None:
        lines = [f"# {line}" for line in (f"{name}: {obstacle}", *lines)]
    return "\n".join(lines) + "\n"


_HEAD = """\
# Configuration of `lfmc check`: the models to export and verify, and the numbers to meet.
# Every key is a flag of `lfmc export`; see `lfmc export --help`. `lfmc doctor` lists the values
# that `option` accepts. The comments show their defaults.

baseline = "{baseline}"  # `lfmc check --accept` writes this file; commit it

[drift]  # how much worse than the baseline a cell may be
kl = 0.05    # relative, 0.05 = 5 %
top1 = 0.01  # absolute, 0.01 = 1 % of all tokens
size = 0.01  # relative, 0.01 = 1 %

[defaults]  # for every cell; keys of an [[export]] override these
{models}
model = {model}
context = {context}
bits-per-weight = {bits}  # or max-size = "700MB"
check = "full"  # or "fast": fewer parity cases, shorter text
# max-kl = 0.1      # KL divergence to the float32 model, nats per token
# min-top1 = 0.8    # fraction of tokens with the same most likely token as the float32 model
# min-speed = 20    # tokens per second of decode, on the machine that runs `lfmc check`
# text = "eval.txt" # text to measure quality on, instead of the text that ships with lfmc
"""
