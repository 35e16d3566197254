"""What a kept bundle depends on."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from lfmc.check import cell_key as module
from lfmc.check.cell_key import cell_key, code_digest, versions
from lfmc.check.config import Cell, Gates
from lfmc.checkpoint.checkpoint import open_checkpoint

PACKAGES = ["onnx==1.23.2"]
CELL = Cell("cell", None, "onnx", ("--bits", "4"), Gates(), isolated=False)


def test_flags_and_files_count_and_gates_do_not(tmp_path: Path) -> None:
    checkpoint = open_checkpoint()
    key = cell_key(CELL, checkpoint, tmp_path, PACKAGES)
    assert (
        cell_key(replace(CELL, name="other", gates=Gates(max_kl=1)), checkpoint, tmp_path, PACKAGES)
        == key
    )
    assert cell_key(replace(CELL, arguments=("--bits", "8")), checkpoint, tmp_path, PACKAGES) != key
    assert cell_key(replace(CELL, target="coreml"), checkpoint, tmp_path, PACKAGES) != key
    assert cell_key(CELL, checkpoint, tmp_path, ["onnx==1.23.3"]) != key
    judged = replace(CELL, arguments=("--bits", "4", "--text", "own.txt"))
    (tmp_path / "own.txt").write_text("one")
    first = cell_key(judged, checkpoint, tmp_path, PACKAGES)
    (tmp_path / "own.txt").write_text("two")
    assert len({key, first, cell_key(judged, checkpoint, tmp_path, PACKAGES)}) == 3


def test_what_a_target_and_rung_1_need_are_the_packages() -> None:
    found = [own.partition("==")[0] for own in versions("onnx")]
    assert {"torch", "onnx", "onnxruntime", "transformers"} <= set(found)
    assert not {"coremltools", "apache-tvm", "pytest"} & set(found)


def test_the_code_of_a_target_that_is_no_part_of_lfmc_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other_target.py"
    path.write_text("VERSION = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    @dataclass(frozen=True)
    class Other:
        extra: ClassVar[str] = "other"

    Other.__module__ = "other_target"
    monkeypatch.setattr(module, "get_target", lambda name: Other())
    keys = []
    for version in (1, 2):
        path.write_text(f"VERSION = {version}\n")
        code_digest.cache_clear()
        keys.append(cell_key(CELL, open_checkpoint(), tmp_path, PACKAGES))
    code_digest.cache_clear()
    del sys.modules["other_target"]
    assert keys[0] != keys[1]
