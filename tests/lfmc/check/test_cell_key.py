"""The cache key of a cell: what changes it and what does not."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from lfmc.check import cell_key as module
from lfmc.check.cell_key import cell_key, code_digest, package_versions
from lfmc.check.config import Cell, Gates
from lfmc.checkpoint.checkpoint import open_checkpoint

PACKAGES = ["onnx==1.23.2"]
CELL = Cell("cell", None, "onnx", ("--bits", "4"), Gates(), isolated=False)


def test_the_key_depends_on_flags_and_file_contents_and_not_on_gates(tmp_path: Path) -> None:
    checkpoint = open_checkpoint()
    key = cell_key(CELL, checkpoint, tmp_path, PACKAGES)
    assert (
        cell_key(replace(CELL, name="other", gates=Gates(max_kl=1)), checkpoint, tmp_path, PACKAGES)
        == key
    )
    assert cell_key(replace(CELL, arguments=("--bits", "8")), checkpoint, tmp_path, PACKAGES) != key
    assert cell_key(replace(CELL, target="coreml"), checkpoint, tmp_path, PACKAGES) != key
    assert cell_key(CELL, checkpoint, tmp_path, ["onnx==1.23.3"]) != key
    with_text = replace(CELL, arguments=("--bits", "4", "--text", "eval.txt"))
    (tmp_path / "eval.txt").write_text("one")
    first = cell_key(with_text, checkpoint, tmp_path, PACKAGES)
    (tmp_path / "eval.txt").write_text("two")
    second = cell_key(with_text, checkpoint, tmp_path, PACKAGES)
    assert len({key, first, second}) == 3


def test_packages_are_those_of_the_target_and_of_rung_1() -> None:
    names = {package.partition("==")[0] for package in package_versions("onnx")}
    assert {"torch", "onnx", "onnxruntime", "transformers"} <= names
    assert not {"coremltools", "apache-tvm", "pytest"} & names


def test_the_key_depends_on_the_code_of_an_external_target(
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
