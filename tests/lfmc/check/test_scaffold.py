"""`lfmc init` writes a file that `lfmc check` accepts."""

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
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints and an unsupported model."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny_checkpoint(folder / "models" / "dense", "lfm2")
    save_tiny_checkpoint(folder / "experts", "lfm2_moe")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "bert"}')
    return folder


def test_checkpoints_below_a_folder_are_found(project: Path) -> None:
    assert find_models(project) == ["experts", "models/dense"]


def test_the_file_has_all_models_and_targets(project: Path) -> None:
    command = [sys.executable, "-m", "lfmc", "init"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=project, check=False)
    assert process.returncode == 0, process.stderr
    text = (project / ".lfmc.toml").read_text()
    assert "# experts: lfm2_moe, " in text
    assert "at most 512 tokens" in text
    cells = load_matrix(project / ".lfmc.toml", export_command).cells
    assert {cell.model for cell in cells} == {"experts", "models/dense"}
    assert {"onnx", "coreml"} <= {cell.target for cell in cells}
    flags = dict(zip(cells[0].arguments[::2], cells[0].arguments[1::2], strict=True))
    assert flags == {"--context": "512", "--bits-per-weight": "4.5", "--check": "full"}
    repeated = subprocess.run(command, capture_output=True, text=True, cwd=project, check=False)
    assert repeated.returncode == 2
    assert "--force" in repeated.stderr


def test_a_target_with_a_missing_package_is_a_comment_with_the_reason(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "coremltools" else name)
    text = scaffold({"model": open_checkpoint(project / "experts")})
    assert "# coreml: coremltools is not installed here: pip install 'lfmc[coreml]'" in text
    (tmp_path / ".lfmc.toml").write_text(text)
    assert "coreml" not in targets_of(tmp_path)
    # Without the comment signs, the target is a cell.
    (tmp_path / ".lfmc.toml").write_text(
        text.replace("# [[export]]", "[[export]]")
        .replace('# target = "coreml"', 'target = "coreml"')
        .replace('# target = "ethos-u"', 'target = "ethos-u"')
        .replace('# target = "qualcomm"', 'target = "qualcomm"')
    )
    assert "coreml" in targets_of(tmp_path)


def targets_of(folder: Path) -> set[str]:
    """Return the targets of the cells of a folder's `.lfmc.toml`."""
    return {cell.target for cell in load_matrix(folder / ".lfmc.toml", export_command).cells}
