"""Types of options and arguments: they parse values, advise on misspelled ones, and complete them.

Shell completion calls `shell_complete`, so nothing here imports a large package unless a value is
wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from lfmc.errors import InputError, did_you_mean

PATH = click.Path(path_type=Path)

BITS = ("auto", "alphaq", "uniform", "none", "2", "3", "4", "6", "8")
CHECKS = ("full", "fast", "off")
EFFORTS = ("fast", "best", "max")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kMG]i?)B?|B)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_UNIT_NBYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

# Spellings of other tools: int4, 4bit, 4-bit, w4a16, q4_k_m, iq4_xs, nf4, fp8
_WIDTH = re.compile(
    r"(?:u?int|[iu]|w|i?q|nf|fp|mxfp|nvfp)?[-_]?([23468])[-_ ]?(?:bits?|b)?(?:[-_a].*)?",
    re.IGNORECASE,
)
_FLOAT = re.compile(r"(?:b?f|fp|b?float)?[-_]?(?:16|32)(?:[-_ ]?bits?)?|half|float", re.IGNORECASE)
_MIXED = re.compile(r"i?q([2-8])_(?:k|xs|xxs|s|m).*", re.IGNORECASE)  # GGUF, of several widths


def completions(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Return the words that start with the text so far."""
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


class Folder(click.Path):
    """A path that the shell completes with folders. The command checks it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


FOLDER = Folder()


class Model(click.ParamType[str]):
    """A checkpoint folder or a hub id; the shell completes folders."""

    name = "model"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        return str(value)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class Word(click.ParamType[str]):
    """A word that the command checks later; the shell completes the words that are usual."""

    name = "text"

    def __init__(self, *words: str) -> None:
        self._words = words

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        return str(value)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        return completions(self._words, incomplete)


class TargetName(click.ParamType[str]):
    """The name of a target, which the command checks; the shell completes the known ones."""

    name = "target"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        return str(value)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        from lfmc.targets.base import target_names

        return completions(target_names(), incomplete)


class Bits(click.ParamType[str]):
    """A value of `--bits`.

    Raises `InputError` only for values that are known to be misspelled; the planner checks others.
    """

    name = "bits"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        text = str(value)
        advice = None if text in BITS else advise_bits(text)
        if advice is not None:
            raise InputError(
                "--bits does not have this value",
                expected=", ".join(BITS),
                got=repr(text),
                todo=advice,
            )
        return text

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        return completions(BITS, incomplete)


def advise_bits(text: str) -> str | None:
    """Return what to write for a misspelled value of `--bits`, or None if it is not recognized."""
    text = text.strip()
    if match := _MIXED.fullmatch(text):
        return (
            f"write --bits {_width(match[1])}, or --bits-per-weight {match[1]}.5 for mixed widths"
        )
    if match := _WIDTH.fullmatch(text):
        return f"write --bits {_width(match[1])}" if text != match[1] else None
    if _FLOAT.fullmatch(text):
        return "write --bits none, which quantizes nothing"
    return did_you_mean(text, [name for name in BITS if not name.isdigit()])


def _width(digit: str) -> str:
    """Return the nearest width that lfmc supports and that is not smaller: 5 becomes 6."""
    return next(width for width in BITS if width.isdigit() and int(width) >= int(digit))


class Size(click.ParamType[int]):
    """A number of bytes, written as `12MB` (10^6), `12MiB` (2^20) or `12B`."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        return parse_size(str(value))


def parse_size(text: str) -> int:
    """Return the bytes of `700MB`, `1.5 GiB` or `123456B`; raise `InputError` for other text."""
    text = text.strip()
    match = _SIZE.fullmatch(text)
    if not match:
        todo = None
        if _NUMBER.fullmatch(text):
            todo = f"write {text}MB, {text}MiB or {text}GB, or {text}B for bytes"
        raise InputError(
            "a size can't be read",
            expected="a number and a unit, such as 12MB, 700MiB or 1.4GB",
            got=repr(text),
            todo=todo,
        )
    return int(float(match[1]) * _UNIT_NBYTES[(match[2] or "").lower()])


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
            raise InputError(
                "an option can't be read",
                expected="NAME=VALUE",
                got=repr(value),
                todo=_advise_setting(str(value)),
            )
        return name.strip(), setting.strip()


def _advise_setting(text: str) -> str | None:
    """Return the settings with this value, or the values of the option with this name."""
    from lfmc.targets.base import TARGETS, get_target

    settings: dict[str, list[str]] = {}
    for name in TARGETS:
        for option in get_target(name).options:
            if text == option.name:
                settings.setdefault(f"{text}={'|'.join(option.choices)}", []).append(name)
            elif text in option.choices and not text.isdigit():
                settings.setdefault(f"{option.name}={text}", []).append(name)
    if not settings:
        return None
    return "write " + " or ".join(f"-O {s} ({', '.join(t)})" for s, t in settings.items())
