"""Options that several commands share, and reading their values."""

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

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?i?)B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

BITS_HELP = (
    "auto: the best that weights alone can tell. alphaq: the AlphaQ paper, for experts. uniform: "
    "one format everywhere. none: as stored. 2, 3, 4, 6, 8: that width."
)
ALPHAQ_HELP = {
    "gamma": "alphaq: power of the sensitivity. [default: 1]",
    "bits": "alphaq: widths to choose from (2,3,4). [default: of 2,3,4,8 those of the target]",
    "block": "alphaq: side of the blocks of a spectrum. [default: 128]",
    "tail": "alphaq: share of the spectrum that is fitted. [default: 0.1]",
}


class Size(click.ParamType[int]):
    """Bytes written as `12MB` (10^6), `12MiB` (2^20) or a plain number."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        return parse_size(str(value))


def parse_size(text: str) -> int:
    """Bytes of `700MB`, `1.5 GiB`, `123456`; raises `InputError` for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise InputError("a size can't be read", expected="12MB, 12MiB or a number", got=repr(text))
    return int(float(found[1]) * _UNITS[found[2].lower()])


def model_argument(function: F) -> F:
    return click.argument("model", required=False)(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(function)


class Widths(click.ParamType[tuple[int, ...]]):
    """Widths written as `2,3,4`."""

    name = "widths"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError as error:
            raise InputError(
                "widths can't be read", expected="2,3,4", got=repr(str(value))
            ) from error


class Setting(click.ParamType[tuple[str, str]]):
    """A choice written as `NAME=VALUE`."""

    name = "name=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, found, chosen = str(value).partition("=")
        if not found:
            raise InputError("an option can't be read", expected="NAME=VALUE", got=repr(value))
        return name.strip(), chosen.strip()


def alphaq_options(knobs: dict[str, Any]) -> AlphaQOptions | None:
    """The `--alphaq-...` of a command line, by name; None where none is given.

    Raises `InputError` for values that make no sense.
    """
    from lfmc.calib_free.alphaq.allocation import AlphaQOptions

    given = {k.removeprefix("alphaq_"): v for k, v in knobs.items() if v is not None}
    return AlphaQOptions(**given) if given else None


def plan_options(function: F) -> F:
    """Everything that decides a plan: target, bits, budget, seed, and the knobs of alphaq."""
    for option in reversed(
        [
            click.option("--target", default="onnx", show_default=True, help="Where it will run."),
            click.option("--bits", help=BITS_HELP + " [default: auto]"),
            click.option(
                "--bits-per-weight",
                type=float,
                help="Budget: every stored byte over every parameter. 4.5 if none is given.",
            ),
            click.option(
                "--max-size",
                type=Size(),
                help="Budget in bytes of the artifact's files (12MB, 700MiB).",
            ),
            click.option("--seed", default=0, show_default=True, help="Of what the model samples."),
            click.option(
                "--effort",
                default="fast",
                show_default=True,
                help="fast: choose formats only. best: also fit codes, scales and norms to text "
                "that the model writes, minutes on a CPU. max: the same at length, for a GPU.",
            ),
            click.option("--minutes", type=float, help="At most this long for fitting."),
            click.option(
                "--fit-device",
                default="cpu",
                show_default=True,
                help="Where to fit, and to take alphaq's spectra: cpu or cuda.",
            ),
            click.option(
                "--gpus",
                default=1,
                show_default=True,
                help="GPUs that learn end to end together: 1, 2, 4 or 8.",
            ),
            click.option("--alphaq-gamma", type=float, help=ALPHAQ_HELP["gamma"]),
            click.option("--alphaq-bits", type=Widths(), help=ALPHAQ_HELP["bits"]),
            click.option("--alphaq-block", type=int, help=ALPHAQ_HELP["block"]),
            click.option("--alphaq-tail", type=float, help=ALPHAQ_HELP["tail"]),
        ]
    ):
        function = option(function)
    return function


def measuring_options(function: F) -> F:
    """Where measuring is done, and whether what it found is kept; neither changes a plan."""
    workers = click.option(
        "--workers", help="dask://HOST:PORT: measure on a dask cluster instead of here."
    )
    text = "Neither read nor write what was measured before ($LFMC_CACHE, or ~/.cache/lfmc)."
    return workers(click.option("--no-cache", is_flag=True, help=text)(function))


def text_option(function: F) -> F:
    path = click.Path(path_type=Path)
    text = "Judge rung 4 on this text, UTF-8. [default: passages that ship with lfmc]"
    return click.option("--text", type=path, help=text)(function)


def trace_option(function: F) -> F:
    text = "Where a rung fails, find the first operator that differs and show it: minutes."
    return click.option("--trace", is_flag=True, help=text)(function)


def report_option(function: F) -> F:
    path = click.Path(path_type=Path)
    text = "Also write a page to look at: one HTML file that loads nothing."
    return click.option("--report", type=path, help=text)(function)


def force_option(function: F) -> F:
    return click.option("--force", is_flag=True, help="Replace files that exist.")(function)


def require_absent(path: Path | None, force: bool) -> None:
    """Raise `InputError` where a file is in the way and `--force` was not given."""
    if path is not None and path.exists() and not force:
        raise InputError("the output exists already", where=path, todo="--force replaces it")


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8; raises `InputError` where that can't be done."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError("the output can't be written", where=path, got=error) from error


def announce(checkpoint: Any, given: str | None) -> None:
    """Say so, on stderr, when the bundled checkpoint stands in for a model."""
    if given is None:
        click.echo(
            f"no MODEL given: using {checkpoint.name}, the small checkpoint that ships with lfmc "
            "(it shows that numbers survive, and is good for nothing else)",
            err=True,
        )
