"""Read and validate `.lfmc.toml`: the cells to export and the numbers that they must meet.

Its keys are the flags of `lfmc export`. The schema of a cell is built from the options of that
command, which the caller passes in.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lfmc.check.toml_lines import KeyLines, find_key_lines, line_of
from lfmc.errors import InputError, LfmcError
from lfmc.targets.base import no_such_target, target_names

FILE, BASELINE, DEMO = ".lfmc.toml", "lfmc-baseline.json", "demo"
# Flags that `lfmc check` sets itself (failures are always traced).
EXCLUDED_OPTIONS = ("output", "force", "dry_run", "as_json", "trace", "quiet", "verbose")
GATES = ("max-kl", "min-top1", "min-speed")  # a bundle does not depend on these
CELL_FIELDS = (
    "name",
    "model",
    "adapter",
    "target",
    "isolated",
)  # fields of `Cell`, not export arguments
STRICT = ConfigDict(extra="forbid", strict=True)


class Drift(BaseModel):
    """How much worse than the baseline a number may be: KL and size relative, top-1 absolute."""

    model_config = STRICT
    kl: float = Field(default=0.05, ge=0)
    top1: float = Field(default=0.01, ge=0, le=1)
    size: float = Field(default=0.01, ge=0)


@dataclass(frozen=True)
class Gates:
    """Limits that a cell must meet; None for no limit."""

    max_kl: float | None = None
    min_top1: float | None = None
    min_speed: float | None = None


@dataclass(frozen=True)
class Cell:
    """One export of the matrix.

    `model` None is the checkpoint that ships with lfmc; `adapter` is merged into it. `arguments`
    are the other flags of `lfmc export`, without gates.
    """

    name: str
    model: str | None
    target: str
    arguments: tuple[str, ...]
    gates: Gates
    isolated: bool
    adapter: str | None = None


@dataclass(frozen=True)
class Matrix:
    """A validated configuration file; its paths are relative to `folder`."""

    folder: Path
    baseline: Path
    drift: Drift
    cells: tuple[Cell, ...]


def load_matrix(path: Path, export_command: click.Command) -> Matrix:
    """Read and validate a file; raise `InputError` with the file, the line and the wrong key."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError as error:
        raise InputError(
            "the configuration file does not exist", where=path, todo="lfmc init writes one"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("the configuration file can't be read", where=path, got=error) from error
    lines = find_key_lines(text)
    try:
        config: Any = _schema(export_command).model_validate(data)
    except ValidationError as error:
        messages = "\n".join(_message(e, lines, export_command) for e in error.errors())
        raise InputError("the configuration file is not valid", where=path, got=messages) from error
    defaults = _set_values(config.defaults)
    _validate(defaults, export_command, path, partial(_key_line, lines, "defaults"))
    cells: list[Cell] = []
    for index, table in enumerate(config.export):
        values = _set_values(table)
        _validate(values, export_command, path, partial(_key_line, lines, "export", index))
        cells += _expand_cells(defaults | values)
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                "two cells have the same name",
                where=path,
                got=name,
                todo="set another `name` for one of them",
            )
    folder = path.resolve().parent  # cells run in this folder, not in the current one
    return Matrix(folder, folder / config.baseline, config.drift, tuple(cells))


def _schema(export_command: click.Command) -> type[BaseModel]:
    """Return the model of a file: `baseline`, `[drift]`, `[defaults]` and `[[export]]`."""
    fields: dict[str, Any] = {
        key: (value_type | None, None) for key, value_type in export_keys(export_command).items()
    }
    table = create_model("Export", __config__=STRICT, **fields)
    return create_model(
        "File",
        __config__=STRICT,
        baseline=(str, BASELINE),
        drift=(Drift, Drift()),
        defaults=(table, Field(default_factory=table)),
        export=(list[table], Field(min_length=1)),  # type: ignore[valid-type]
    )


def export_keys(export_command: click.Command) -> dict[str, Any]:
    """Return the keys of an `[[export]]` table with the types of their values."""
    types: dict[str, Any] = {"name": str, "model": str | list[str], "target": str | list[str]}
    for option in export_command.params:
        if isinstance(option, click.Option) and option.name not in (*EXCLUDED_OPTIONS, "target"):
            types[_flag_name(option)] = _value_type(option)
    return types


def _flag_name(option: click.Option) -> str:
    return max(option.opts, key=len).removeprefix("--")


def _value_type(option: click.Option) -> Any:
    if option.multiple:
        return list[str]
    if option.is_flag:
        return bool
    numbers = {"float": float, "integer": int}
    return numbers.get(option.type.name, str | int | float)


def _set_values(table: BaseModel) -> dict[str, Any]:
    return table.model_dump(exclude_unset=True)


def _expand_cells(values: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield a cell for every combination of a table's models and targets."""
    models = _as_list(values.get("model"), DEMO)
    targets = _as_list(values.get("target"), "onnx")
    is_product = len(models) * len(targets) > 1
    for model, target in product(models, targets):
        default_name = f"{Path(model).name}-{target}"
        name = values.get("name", default_name)
        yield Cell(
            f"{name}-{default_name}" if is_product and "name" in values else name,
            None if model == DEMO else model,
            target,
            tuple(_export_arguments(values)),
            Gates(*(values.get(key) for key in GATES)),
            bool(values.get("isolated")),
            values.get("adapter"),
        )


def _as_list(value: str | Sequence[str] | None, default: str) -> list[str]:
    return [default] if value is None else [value] if isinstance(value, str) else list(value)


def _export_arguments(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the command-line arguments of a table's values."""
    for key, value in values.items():
        if key not in (*CELL_FIELDS, *GATES):
            yield from _flag_arguments(key, value)


def _flag_arguments(key: str, value: Any) -> Iterator[str]:
    if value is True:
        yield f"--{key}"
    elif value is not False:
        for element in value if isinstance(value, list) else [value]:
            yield from (f"--{key}", str(element))


def _validate(
    values: Mapping[str, Any],
    export_command: click.Command,
    path: Path,
    key_line: Callable[[str], int],
) -> None:
    """Parse every value with the export command; raise `InputError` with the key's line."""
    for key, value in values.items():
        try:
            if key == "target":
                for name in set(_as_list(value, "")) - set(target_names()):
                    raise no_such_target(name)
            elif key not in CELL_FIELDS:
                export_command.make_context("export", list(_flag_arguments(key, value)))
            if (key, value) == ("check", "off"):
                raise InputError('check = "off" verifies nothing', expected="full or fast")
        except (click.ClickException, LfmcError) as error:
            message = str(error)
            if isinstance(error, click.ClickException):
                message = error.format_message()
            where = f"{path}, line {key_line(key)}, {key}"
            raise InputError(
                "the configuration file is not valid", where=where, got=message
            ) from error


def _key_line(lines: KeyLines, *path: object) -> int:
    return line_of(lines, path)


def _message(error: Any, lines: KeyLines, export_command: click.Command) -> str:
    """Return one line about an error of pydantic."""
    path = [part for part in error["loc"] if not str(part).startswith(("list[", "str"))]
    key = ".".join(f"{part}" for part in path if not isinstance(part, int)) or "export"
    message = error["msg"][:1].lower() + error["msg"][1:]
    if error["type"] == "extra_forbidden":
        message = "there is no such key"
        similar = difflib.get_close_matches(str(path[-1]), _valid_keys(path, export_command), 1)
        hint = f"did you mean {similar[0]}?" if similar else "`lfmc export --help` lists flags"
        message += f"; {hint}"
    return f"line {line_of(lines, path)}, {key}: {message}"


def _valid_keys(path: Sequence[object], export_command: click.Command) -> list[str]:
    """Return the keys that are valid in the table that contains `path`."""
    if len(path) <= 1:
        return ["baseline", "drift", "defaults", "export"]
    return list(Drift.model_fields) if path[0] == "drift" else list(export_keys(export_command))
