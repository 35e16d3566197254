"""Reading a `.lfmc.toml`: its keys are flags of `lfmc export`; errors name the line and the key."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from lfmc.check.config import EXCLUDED_OPTIONS, Gates, export_keys, load_matrix
from lfmc.commands.export import command as export_command
from lfmc.errors import InputError


def write(folder: Path, text: str) -> Path:
    path = folder / ".lfmc.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key_is_a_flag_and_every_flag_a_key() -> None:
    flags = {
        max(option.opts, key=len).removeprefix("--")
        for option in export_command.params
        if isinstance(option, click.Option) and option.name not in EXCLUDED_OPTIONS
    }
    assert set(export_keys(export_command)) == flags | {"name", "model"}


def test_models_and_targets_make_a_matrix(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
baseline = "numbers.json"

[defaults]
context = 128
max-kl = 0.5

[[export]]
model = ["demo", "models/mine"]
target = ["onnx", "coreml"]
max-size = "12MB"

[[export]]
name = "edge"
target = "qualcomm"
option = ["stage=edge", "chunk=16"]
max-kl = 0.1
min-speed = 3
no-cache = true
isolated = false
""",
    )
    matrix = load_matrix(path, export_command)
    assert matrix.baseline == tmp_path / "numbers.json"
    assert [cell.name for cell in matrix.cells] == [
        "demo-onnx",
        "demo-coreml",
        "mine-onnx",
        "mine-coreml",
        "edge",
    ]
    first, *_, edge = matrix.cells
    assert (first.model, matrix.cells[2].model) == (None, "models/mine")
    assert first.arguments == ("--context", "128", "--max-size", "12MB")
    assert first.gates == Gates(max_kl=0.5)
    assert edge.gates == Gates(max_kl=0.1, min_speed=3)
    assert edge.arguments == (
        *("--context", "128", "--no-cache"),
        *("--option", "stage=edge", "--option", "chunk=16"),
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1\n", ["line 1, x: there is no such key", "line 1, export: field required"]),
        ("[[export]]\nmax-k = 1\n", ["line 2, export.max-k: ", "did you mean max-kl?"]),
        (
            '[[export]]\n\n[[export]]\ncontext = "long"\n',
            ["line 4, export.context: input should be a valid integer"],
        ),
        ("[drift]\nkl = -1\n[[export]]\n", ["line 2, drift.kl: ", "greater than or equal to 0"]),
        ("[defaults]\ntarget = 3\n[[export]]\n", ["line 2, defaults.target: "]),
        ("[drift]\nkll = 1\n[[export]]\n", ["line 2, drift.kll: ", "did you mean kl?"]),
        ('[[export]]\nmax-size = "many"\n', ["line 2", "a size can't be read"]),
        ('[[export]]\noption = ["chunk"]\n', ["line 2", "NAME=VALUE"]),
        ('[[export]]\ncheck = "off"\n', ["line 2", "verifies nothing"]),
        ('[[export]]\nalphaq-bits = "a"\n', ["line 2", "widths can't be read"]),
        ('[[export]]\ntarget = "onx"\n', ["line 2, target", "there is no such target", "onnx"]),
        ('[defaults]\noption = ["a"]\n[[export]]\n', ["line 2, option", "NAME=VALUE"]),
        ("[[export]]\n[[export]]\n", ["two cells have the same name", "demo-onnx"]),
        ("[[export]\n", ["can't be read", "line 1"]),
        ("export = []\n", ["line 1, export: ", "at least 1 item"]),
    ],
)
def test_errors_name_the_line_and_the_key(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_matrix(path, export_command)
    message = str(error.value)
    assert str(path) in message
    for part in parts:
        assert part in message


def test_the_error_for_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lfmc init"):
        load_matrix(tmp_path / ".lfmc.toml", export_command)
