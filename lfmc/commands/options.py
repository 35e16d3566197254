"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lfmc.commands.param_types import (
    EFFORTS,
    PATH,
    Bits,
    Model,
    Setting,
    Size,
    TargetName,
    Widths,
    Word,
)
from lfmc.errors import InputError

if TYPE_CHECKING:
    from lfmc.calib_free.alphaq.allocation import AlphaQOptions

F = TypeVar("F", bound=Callable[..., Any])

BITS_HELP = (
    "How bit widths are chosen. auto: best quality for the size, without calibration data. "
    "alphaq: the AlphaQ paper's method, for mixture-of-experts models. uniform: the same format "
    "for all matrices. none: no quantization. 2, 3, 4, 6, 8: this bit width for all matrices. "
    "[default: auto]"
)
ALPHAQ_HELP = {
    "gamma": "With --bits alphaq: exponent of a matrix's sensitivity. [default: 1]",
    "bits": (
        "With --bits alphaq: bit widths to choose from, such as 2,3,4. [default: those of 2,3,4,8 "
        "that the target supports]"
    ),
    "block": (
        "With --bits alphaq: compute eigenvalues of blocks of this many rows and columns. "
        "[default: 128]"
    ),
    "tail": (
        "With --bits alphaq: fraction of the eigenvalues, from the largest, that the power law is "
        "fitted to. [default: 0.1]"
    ),
}


def model_argument(function: F) -> F:
    return click.argument("model", required=False, type=Model())(function)


def adapter_option(function: F) -> F:
    text = "LoRA adapter of MODEL to merge into its weights: a folder or a hub id, saved by peft."
    return click.option("--adapter", type=Model(), help=text)(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(function)


def alphaq_options(flags: dict[str, Any]) -> AlphaQOptions | None:
    """Return the values of the `--alphaq-...` flags, or None if no flag is set.

    Raises `InputError` for values out of range.
    """
    from lfmc.calib_free.alphaq.allocation import AlphaQOptions

    values = {k.removeprefix("alphaq_"): v for k, v in flags.items() if v is not None}
    return AlphaQOptions(**values) if values else None


def plan_options(function: F) -> F:
    """Add the options that a plan depends on: target, bits, budget, seed, effort and AlphaQ's."""
    for option in reversed(
        [
            click.option(
                "--target",
                type=TargetName(),
                default="onnx",
                show_default=True,
                help="Runtime to export for; `lfmc doctor` lists them.",
            ),
            click.option("--bits", type=Bits(), help=BITS_HELP),
            click.option(
                "--bits-per-weight",
                type=float,
                help="Size budget: bits of all stored bytes, divided by the number of parameters. "
                "[default: 4.5 for auto, alphaq and uniform]",
            ),
            click.option(
                "--max-size",
                type=Size(),
                help="Size budget: bytes of the exported model's files, such as 12MB or 700MiB.",
            ),
            click.option(
                "--seed",
                default=0,
                show_default=True,
                help="Random seed for text the model generates while planning.",
            ),
            click.option(
                "--effort",
                type=Word(*EFFORTS),
                default="fast",
                show_default=True,
                help="fast: choose bit widths; no fine-tuning. best: also fine-tune the quantized "
                "weights and norms on text that the model generates, minutes on a CPU. max: "
                "fine-tune for longer, on a GPU.",
            ),
            click.option(
                "--minutes",
                type=float,
                help="Time limit for fine-tuning. [default: a fixed number of steps]",
            ),
            click.option(
                "--fit-device",
                type=Word("cpu", "cuda"),
                default="cpu",
                show_default=True,
                help="Device for fine-tuning and for alphaq's eigenvalues: cpu or cuda.",
            ),
            click.option(
                "--gpus",
                default=1,
                show_default=True,
                help="Number of GPUs for end-to-end fine-tuning: 1, 2, 4 or 8.",
            ),
            click.option("--alphaq-gamma", type=float, help=ALPHAQ_HELP["gamma"]),
            click.option("--alphaq-bits", type=Widths(), help=ALPHAQ_HELP["bits"]),
            click.option("--alphaq-block", type=int, help=ALPHAQ_HELP["block"]),
            click.option("--alphaq-tail", type=float, help=ALPHAQ_HELP["tail"]),
        ]
    ):
        function = option(function)
    return function


def target_option(function: F) -> F:
    """Add `-O NAME=VALUE`, which may be repeated."""
    return click.option(
        "-O",
        "--option",
        "target_options",
        type=Setting(),
        multiple=True,
        help="Set an option of the target; `lfmc doctor` lists them. Repeatable.",
    )(function)


def measuring_options(function: F) -> F:
    """Add the options for where weights are measured and cached; a plan depends on neither."""
    workers = click.option(
        "--workers",
        help="Measure the weights on a dask cluster, dask://HOST:PORT. [default: this machine]",
    )
    text = "Do not read or write the cache of earlier measurements ($LFMC_CACHE, or ~/.cache/lfmc)."
    return workers(click.option("--no-cache", is_flag=True, help=text)(function))


def text_option(function: F) -> F:
    text = "Text file (UTF-8) to measure KL and perplexity on. [default: text that ships with lfmc]"
    return click.option("--text", type=PATH, help=text)(function)


def trace_option(function: F) -> F:
    text = "If a parity check fails, find and show the first operator that differs. Takes minutes."
    return click.option("--trace", is_flag=True, help=text)(function)


def report_option(function: F) -> F:
    text = "Also write an HTML report to this file; it works offline."
    return click.option("--report", type=PATH, help=text)(function)


def force_option(function: F) -> F:
    return click.option("--force", is_flag=True, help="Overwrite existing files.")(function)


def require_target(name: str) -> None:
    """Raise `InputError` for an unknown target, without importing the targets."""
    from lfmc.targets.base import no_such_target, target_names

    if name not in target_names():
        raise no_such_target(name)


def require_absent(path: Path | None, force: bool) -> None:
    """Raise `InputError` if the file exists, unless `force` is set."""
    if path is not None and path.exists() and not force:
        raise InputError("the output exists already", where=path, todo="--force replaces it")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; raise `InputError` if the file can't be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError("the output can't be written", where=path, got=error) from error
