"""The commands that a cell runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfmc.check import cells
from lfmc.check.cells import _CommandResult, run_cell
from lfmc.check.config import load_matrix
from lfmc.checkpoint.checkpoint import demo_path, open_checkpoint
from lfmc.commands.export import command as export_command
from tests.lfmc.checkpoint.test_adapter import low_rank, save_adapter


def test_an_adapter_is_merged_and_its_contents_change_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is relative to the file, and a cached bundle belongs to one adapter's weights."""
    commands: list[tuple[str, ...]] = []

    def run(python: Path, folder: Path, progress: object, *arguments: str) -> _CommandResult:
        commands.append(arguments)
        return _CommandResult(2, {}, "not run")

    monkeypatch.setattr(cells, "_run_lfmc", run)
    module = "model.layers.0.conv.out_proj"
    size = open_checkpoint(demo_path()).config.hidden_size
    fingerprints, bundles = set(), set()
    (tmp_path / ".lfmc.toml").write_text('[[export]]\nadapter = "lora"\n')
    for alpha in (8, 16):
        folder = save_adapter(tmp_path / "lora", low_rank(module, size, size), lora_alpha=alpha)
        matrix = load_matrix(tmp_path / ".lfmc.toml", export_command)
        outcome = run_cell(matrix.cells[0], matrix.folder, tmp_path / "bundles")
        arguments = commands[-1]
        assert arguments[arguments.index("--adapter") + 1] == str(folder)
        fingerprints.add(outcome.fingerprint)
        bundles.add(arguments[arguments.index("--output") + 1])
    assert len(fingerprints) == len(bundles) == 2
