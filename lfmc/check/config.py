"""`.lfmc.toml`: what to export and which numbers to hold. Its keys are the flags of `lfmc export`.

The schema of a cell is built from the options of that command, which the caller passes in.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lfmc.check.toml_lines import Lines, line_of, lines_of
from lfmc.errors import InputError, LfmcError
from lfmc.targets.base import target_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE, BASELINE, DEMO = ".lfmc.toml", "lfmc-baseline.json", "demo"
# Flags that a matrix decides itself (what fails is always traced); and those that are gates, which
# a bundle does not depend on.
NOT_KEYS = ("output", "force", "dry_run", "as_json", "trace")
GATES = ("max-kl", "min-top1", "min-speed")
APART = ("name", "model", "target", "isolated")  # of a cell, and not among its arguments
RULES = ConfigDict(extra="forbid", strict=True)


class Drift(BaseModel):
    """How far a number may be from the baseline's: KL and size in shares of it, top-1 as such."""

    model_config = RULES
    kl: float = Field(default=0.05, ge=0)
    top1: float = Field(default=0.01, ge=0, le=1)
    size: float = Field(default=0.01, ge=0)


@dataclass(frozen=True)
class Gates:
    """Numbers that a cell must hold; None for those that nobody asked for."""

    max_kl: float | None = None
    min_top1: float | None = None
    min_speed: float | None = None


@dataclass(frozen=True)
class Cell:
    """One export of the matrix. `model` None is the checkpoint that ships with lfmc; `arguments`
    are the flags of `lfmc export`, without gates."""

    name: str
    model: str | None
    target: str
    arguments: tuple[str, ...]
    gates: Gates
    isolated: bool


@dataclass(frozen=True)
class Matrix:
    """A file that was read: paths in it are relative to `folder`."""

    folder: Path
    baseline: Path
    drift: Drift
    cells: tuple[Cell, ...]


def load_matrix(path: Path, export_command: click.Command) -> Matrix:
    """Read and check a file; `InputError` names the file, the line and the key of what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text)
    except FileNotFoundError as error:
        raise InputError(
            "there is no file that says what to check", where=path, todo="lfmc init writes one"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("the file can't be read", where=path, got=error) from error
    lines = lines_of(text)
    try:
        checked: Any = _schema(export_command).model_validate(found)
    except ValidationError as error:
        told = "\n".join(_told(one, lines, export_command) for one in error.errors())
        raise InputError("the file is not valid", where=path, got=told) from error
    shared = _given(checked.defaults)
    _read(shared, export_command, path, partial(_line, lines, "defaults"))
    cells: list[Cell] = []
    for index, table in enumerate(checked.export):
        own = _given(table)
        _read(own, export_command, path, partial(_line, lines, "export", index))
        cells += _cells(shared | own)
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                "two cells have one name", where=path, got=name, todo="give one a `name`"
            )
    folder = path.resolve().parent  # cells run there, wherever this was started
    return Matrix(folder, folder / checked.baseline, checked.drift, tuple(cells))


def _schema(export_command: click.Command) -> type[BaseModel]:
    """The whole file: `baseline`, `[drift]`, `[defaults]` and `[[export]]`."""
    fields: dict[str, Any] = {
        key: (kind | None, None) for key, kind in keys(export_command).items()
    }
    table = create_model("Export", __config__=RULES, **fields)
    return create_model(
        "File",
        __config__=RULES,
        baseline=(str, BASELINE),
        drift=(Drift, Drift()),
        defaults=(table, Field(default_factory=table)),
        export=(list[table], Field(min_length=1)),  # type: ignore[valid-type]
    )


def keys(export_command: click.Command) -> dict[str, Any]:
    """Every key of an `[[export]]` table, and what it takes."""
    found: dict[str, Any] = {"name": str, "model": str | list[str], "target": str | list[str]}
    for option in export_command.params:
        if isinstance(option, click.Option) and option.name not in (*NOT_KEYS, "target"):
            found[_flag(option)] = _type(option)
    return found


def _flag(option: click.Option) -> str:
    return max(option.opts, key=len).removeprefix("--")


def _type(option: click.Option) -> Any:
    if option.multiple:
        return list[str]
    if option.is_flag:
        return bool
    numbers = {"float": float, "integer": int}
    return numbers.get(option.type.name, str | int | float)


def _given(table: BaseModel) -> dict[str, Any]:
    return table.model_dump(exclude_unset=True)


def _cells(values: Mapping[str, Any]) -> Iterator[Cell]:
    models = _list(values.get("model"), DEMO)
    targets = _list(values.get("target"), "onnx")
    several = len(models) * len(targets) > 1
    for model, target in product(models, targets):
        own = f"{Path(model).name}-{target}"
        name = values.get("name", own)
        yield Cell(
            f"{name}-{own}" if several and "name" in values else name,
            None if model == DEMO else model,
            target,
            tuple(_arguments(values)),
            Gates(*(values.get(key) for key in GATES)),
            bool(values.get("isolated")),
        )


def _list(value: str | Sequence[str] | None, default: str) -> list[str]:
    return [default] if value is None else [value] if isinstance(value, str) else list(value)


def _arguments(values: Mapping[str, Any]) -> Iterator[str]:
    """The flags of a table, but for what a cell has beside them."""
    for key, value in values.items():
        if key not in (*APART, *GATES):
            yield from _flags(key, value)


def _flags(key: str, value: Any) -> Iterator[str]:
    if value is True:
        yield f"--{key}"
    elif value is not False:
        for one in value if isinstance(value, list) else [value]:
            yield from (f"--{key}", str(one))


def _read(
    values: Mapping[str, Any],
    export_command: click.Command,
    path: Path,
    place: Callable[[str], int],
) -> None:
    """Let the command read every flag: what it refuses is refused here, by the key's line."""
    for key, value in values.items():
        try:
            if key == "target":
                known = target_names()
                for name in set(_list(value, "")) - set(known):
                    raise InputError("there is no such target", expected=known, got=name)
            elif key not in APART:
                export_command.make_context("export", list(_flags(key, value)))
            if (key, value) == ("check", "off"):
                raise InputError("off proves nothing", expected="full or fast")
        except (click.ClickException, LfmcError) as error:
            told = error.format_message() if isinstance(error, click.ClickException) else str(error)
            where = f"{path}, line {place(key)}, {key}"
            raise InputError("the file is not valid", where=where, got=told) from error


def _line(lines: Lines, *place: object) -> int:
    return line_of(lines, place)


def _told(error: Any, lines: Lines, export_command: click.Command) -> str:
    """One line about one error of pydantic."""
    place = [part for part in error["loc"] if not str(part).startswith(("list[", "str"))]
    key = ".".join(f"{part}" for part in place if not isinstance(part, int)) or "export"
    message = error["msg"][:1].lower() + error["msg"][1:]
    if error["type"] == "extra_forbidden":
        message = "there is no such key"
        near = difflib.get_close_matches(str(place[-1]), _siblings(place, export_command), 1)
        message += f"; did you mean {near[0]}?" if near else "; `lfmc export --help` lists flags"
    return f"line {line_of(lines, place)}, {key}: {message}"


def _siblings(place: Sequence[object], export_command: click.Command) -> list[str]:
    if place[0] == "drift" and len(place) > 1:
        return list(Drift.model_fields)
    return (
        list(keys(export_command))
        if len(place) > 1
        else ["baseline", "drift", "defaults", "export"]
    )
