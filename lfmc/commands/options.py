"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lfmc.errors import InputError

if TYPE_CHECKING:
    from lfmc.calib_free.alphaq.allocation import AlphaQOptions

F = TypeVar("F", bound=Callable[..., Any])

_SIZE_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?i?)B?", re.IGNORECASE)
_UNIT_NBYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

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


class Size(click.ParamType[int]):
    """A number of bytes, written as `12MB` (10^6), `12MiB` (2^20) or a plain number."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        return parse_size(str(value))


def parse_size(text: str) -> int:
    """Return the bytes of `700MB`, `1.5 GiB` or `123456`; raise `InputError` for other text."""
    match = _SIZE_PATTERN.fullmatch(text.strip())
    if not match:
        raise InputError("a size can't be read", expected="12MB, 12MiB or a number", got=repr(text))
    return int(float(match[1]) * _UNIT_NBYTES[match[2].lower()])


def model_argument(function: F) -> F:
    return click.argument("model", required=False)(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(function)


class Widths(click.ParamType[tuple[int, ...]]):
    """Bit widths, written as `2,3,4`."""

    name = "widths"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError as error:
            raise InputError(
                "bit widths can't be read", expected="2,3,4", got=repr(str(value))
            ) from error


class Setting(click.ParamType[tuple[str, str]]):
    """A target option, written as `NAME=VALUE`."""

    name = "name=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, separator, setting = str(value).partition("=")
        if not separator:
            raise InputError("an option can't be read", expected="NAME=VALUE", got=repr(value))
        return name.strip(), setting.strip()


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
                default="onnx",
                show_default=True,
                help="Runtime to export for; `lfmc doctor` lists them.",
            ),
            click.option("--bits", help=BITS_HELP),
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
    path = click.Path(path_type=Path)
    text = "Text file (UTF-8) to measure KL and perplexity on. [default: text that ships with lfmc]"
    return click.option("--text", type=path, help=text)(function)


def trace_option(function: F) -> F:
    text = "If a parity check fails, find and show the first operator that differs. Takes minutes."
    return click.option("--trace", is_flag=True, help=text)(function)


def report_option(function: F) -> F:
    path = click.Path(path_type=Path)
    text = "Also write an HTML report to this file; it works offline."
    return click.option("--report", type=path, help=text)(function)


def force_option(function: F) -> F:
    return click.option("--force", is_flag=True, help="Overwrite existing files.")(function)


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


def announce(checkpoint: Any, model: str | None) -> None:
    """Print a note to stderr if the bundled test model is used because no model is set."""
    if model is None:
        click.echo(
            f"no MODEL given: using {checkpoint.name}, which ships with lfmc "
            "(a tiny test model; its text is not meaningful)",
            err=True,
        )
