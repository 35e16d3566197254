"""`lfmc init` writes a file that `lfmc check` takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lfmc.check import scaffold as module
from lfmc.check.config import load_matrix
from lfmc.check.scaffold import find_models, scaffold
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.commands.export import command as export_command
from tests.factories import save_tiny_checkpoint


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("team")
    save_tiny_checkpoint(folder / "models" / "dense", "lfm2")
    save_tiny_checkpoint(folder / "experts", "lfm2_moe")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "bert"}')
    return folder


def test_checkpoints_below_a_folder_are_found(team: Path) -> None:
    assert find_models(team) == ["experts", "models/dense"]


def test_what_it_writes_is_a_matrix_of_all_of_them(team: Path) -> None:
    command = [sys.executable, "-m", "lfmc", "init"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=team, check=False)
    assert done.returncode == 0, done.stderr
    text = (team / ".lfmc.toml").read_text()
    assert "# experts: lfm2_moe, " in text
    assert "at most 512 tokens" in text
    cells = load_matrix(team / ".lfmc.toml", export_command).cells
    assert {cell.model for cell in cells} == {"experts", "models/dense"}
    assert {"onnx", "coreml"} <= {cell.target for cell in cells}
    flags = dict(zip(cells[0].arguments[::2], cells[0].arguments[1::2], strict=True))
    assert flags == {"--context": "512", "--bits-per-weight": "4.5", "--check": "full"}
    again = subprocess.run(command, capture_output=True, text=True, cwd=team, check=False)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_a_target_that_is_not_here_is_a_comment_with_the_reason(
    team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "coremltools" else name)
    text = scaffold({"model": open_checkpoint(team / "experts")})
    assert "# coreml: coremltools is not installed here: pip install 'lfmc[coreml]'" in text
    (tmp_path / ".lfmc.toml").write_text(text)
    assert "coreml" not in {
        cell.target for cell in load_matrix(tmp_path / ".lfmc.toml", export_command).cells
    }
    # Without the marks, it is a cell like the others.
    (tmp_path / ".lfmc.toml").write_text(
        text.replace("# [[export]]", "[[export]]")
        .replace('# target = "coreml"', 'target = "coreml"')
        .replace('# target = "ethos-u"', 'target = "ethos-u"')
        .replace('# target = "qualcomm"', 'target = "qualcomm"')
    )
    assert "coreml" in {
        cell.target for cell in load_matrix(tmp_path / ".lfmc.toml", export_command).cells
    }


def targets_of(folder: Path) -> set[str]:
    """Targets of the cells of a folder's `.lfmc.toml`."""
    return {cell.target for cell in load_matrix(folder / ".lfmc.toml", export_command).cells}
