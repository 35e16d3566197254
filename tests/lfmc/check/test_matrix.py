"""`lfmc check` end to end: the command in a project folder with a tiny checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factories import save_tiny_checkpoint

FILE = """\
[defaults]
model = "model"
context = 64
check = "fast"
bits = "4"

[[export]]
target = "onnx"
max-kl = 5

[[export]]
target = "coreml"
"""

# A regression in a lowering: gated products become sums.
FAULT = """\
from lfmc.targets.onnx.handlers import HANDLERS

HANDLERS["lfm.swiglu"] = HANDLERS["aten.add"]
"""


class Project:
    """A folder with a checkpoint and a `.lfmc.toml`; runs `lfmc check` in it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self._env = {**os.environ, "LFMC_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def check(
        self,
        *arguments: str,
        site: str | None = None,
        cwd: Path | None = None,
        cache: str | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Return the exit code and all cells; every process runs `site` when it starts."""
        env = self._env if cache is None else {**self._env, "LFMC_CACHE": cache}
        if site is not None:
            site_folder = self.folder / "site"
            site_folder.mkdir(exist_ok=True)
            (site_folder / "sitecustomize.py").write_text(site)
            env = {**env, "PYTHONPATH": str(site_folder)}
        command = [sys.executable, "-m", "lfmc", "check", "--json", *arguments]
        process = subprocess.run(
            command, capture_output=True, text=True, cwd=cwd or self.folder, env=env, check=False
        )
        assert process.stdout, process.stderr
        return process.returncode, json.loads(process.stdout)["cells"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with an accepted baseline."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny_checkpoint(folder / "model", "lfm2")
    (folder / ".lfmc.toml").write_text(FILE)
    project = Project(folder, tmp_path_factory.mktemp("cells"))
    code, cells = project.check("--accept")
    assert code == 0, cells
    assert [cell["status"] for cell in cells.values()] == ["passed", "passed"]
    assert not any(cell["kept"] for cell in cells.values())
    return project


def test_unchanged_cells_come_from_the_cache(project: Project) -> None:
    before = (project.folder / "lfmc-baseline.json").read_text()
    code, cells = project.check()
    assert code == 0
    assert list(cells) == ["model-onnx", "model-coreml"]
    assert all(cell["kept"] and cell["status"] == "passed" for cell in cells.values())
    assert (project.folder / "lfmc-baseline.json").read_text() == before
    baseline = json.loads(before)["cells"]
    assert {name: cell["numbers"] for name, cell in cells.items()} == {
        name: cell["numbers"] for name, cell in baseline.items()
    }


def test_paths_are_relative_to_the_file(project: Project) -> None:
    """Cells run in the file's folder, also for a relative file and a relative cache."""
    parent, name = project.folder.parent, project.folder.name
    arguments = (f"{name}/.lfmc.toml", "--fresh", "--only", "model-onnx")
    code, cells = project.check(*arguments, cwd=parent, cache=f"{name}/project-cache")
    assert code == 0, cells
    assert Path(cells["model-onnx"]["bundle"]).is_relative_to(project.folder / "project-cache")
    assert not (project.folder / name).exists()


def test_gates_and_the_baseline_apply_to_cached_bundles(project: Project) -> None:
    config, baseline = project.folder / ".lfmc.toml", project.folder / "lfmc-baseline.json"
    before = baseline.read_text()
    data = json.loads(before)
    data["cells"]["model-coreml"]["numbers"]["nbytes"] //= 2
    baseline.write_text(json.dumps(data))
    config.write_text(FILE.replace("max-kl = 5", "max-kl = 1e-9"))
    code, cells = project.check()
    baseline.write_text(before)
    config.write_text(FILE)
    assert code == 3
    assert all(cell["kept"] and cell["status"] == "failed" for cell in cells.values())
    assert cells["model-onnx"]["reasons"][0].startswith("max-kl = 1e-09 is not met")
    assert cells["model-coreml"]["reasons"][0].startswith("size went from")


def test_a_fault_in_one_lowering_fails_only_that_cell(project: Project) -> None:
    code, cells = project.check("--fresh", site=FAULT)
    assert code == 3
    assert cells["model-onnx"]["status"] == "failed"
    assert "parity rung 3 failed" in cells["model-onnx"]["reasons"][0]
    assert "lfm.swiglu" in cells["model-onnx"]["reasons"][1]
    assert cells["model-onnx"]["place"]["layer"] == 0
    assert cells["model-onnx"]["bundle"] is None
    assert cells["model-coreml"]["status"] == "passed"


def test_a_cell_with_a_missing_package_is_skipped(project: Project) -> None:
    site = "import sys\nsys.modules['coremltools'] = None\n"
    code, cells = project.check("--fresh", "--only", "model-coreml", site=site)
    assert code == 4  # no cell was executed
    assert cells["model-coreml"]["status"] == "skipped"
    assert "coremltools" in cells["model-coreml"]["reasons"][0]


def test_a_changed_checkpoint_is_exported_again(project: Project) -> None:
    path = project.folder / "model" / "model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("w1.weight"))
    tensors[name] = tensors[name] + 0.01 * torch.ones_like(tensors[name])
    save_file(tensors, path, {"format": "pt"})
    code, cells = project.check("--only", "model-onnx")
    path.write_bytes(before)
    assert list(cells) == ["model-onnx"]
    assert not cells["model-onnx"]["kept"]
    baseline = json.loads((project.folder / "lfmc-baseline.json").read_text())["cells"]
    assert cells["model-onnx"]["fingerprint"] != baseline["model-onnx"]["fingerprint"]
    assert code in (0, 3)
