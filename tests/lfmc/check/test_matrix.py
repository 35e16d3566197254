"""`lfmc check` as a team meets it: by the command, on a tiny checkpoint, one story per test."""

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

# What a regression of a lowering is like: gated products that are sums.
FAULT = """\
from lfmc.targets.onnx.handlers import HANDLERS

HANDLERS["lfm.swiglu"] = HANDLERS["aten.add"]
"""


class Team:
    """A folder with a checkpoint and a `.lfmc.toml`, and `lfmc check` run in it."""

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
        """The exit code and every cell; `site` is run at the start of every process."""
        env = self._env if cache is None else {**self._env, "LFMC_CACHE": cache}
        if site is not None:
            place = self.folder / "site"
            place.mkdir(exist_ok=True)
            (place / "sitecustomize.py").write_text(site)
            env = {**env, "PYTHONPATH": str(place)}
        command = [sys.executable, "-m", "lfmc", "check", "--json", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=cwd or self.folder, env=env, check=False
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)["cells"]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    """A team that has accepted its first numbers."""
    folder = tmp_path_factory.mktemp("team")
    save_tiny_checkpoint(folder / "model", "lfm2")
    (folder / ".lfmc.toml").write_text(FILE)
    made = Team(folder, tmp_path_factory.mktemp("cells"))
    code, cells = made.check("--accept")
    assert code == 0, cells
    assert [own["status"] for own in cells.values()] == ["passed", "passed"]
    assert not any(own["kept"] for own in cells.values())
    return made


def test_what_did_not_change_is_kept(team: Team) -> None:
    before = (team.folder / "lfmc-baseline.json").read_text()
    code, cells = team.check()
    assert code == 0
    assert list(cells) == ["model-onnx", "model-coreml"]
    assert all(own["kept"] and own["status"] == "passed" for own in cells.values())
    assert (team.folder / "lfmc-baseline.json").read_text() == before
    known = json.loads(before)["cells"]
    assert {name: own["numbers"] for name, own in cells.items()} == {
        name: own["numbers"] for name, own in known.items()
    }


def test_paths_are_those_of_the_file_from_wherever_it_is_checked(team: Team) -> None:
    """A relative file and a relative cache: cells run in the file's folder."""
    parent, name = team.folder.parent, team.folder.name
    arguments = (f"{name}/.lfmc.toml", "--fresh", "--only", "model-onnx")
    code, cells = team.check(*arguments, cwd=parent, cache=f"{name}/own-cache")
    assert code == 0, cells
    assert Path(cells["model-onnx"]["bundle"]).is_relative_to(team.folder / "own-cache")
    assert not (team.folder / name).exists()


def test_gates_and_the_baseline_are_held_against_kept_bundles(team: Team) -> None:
    config, baseline = team.folder / ".lfmc.toml", team.folder / "lfmc-baseline.json"
    before = baseline.read_text()
    known = json.loads(before)
    known["cells"]["model-coreml"]["numbers"]["nbytes"] //= 2
    baseline.write_text(json.dumps(known))
    config.write_text(FILE.replace("max-kl = 5", "max-kl = 1e-9"))
    code, cells = team.check()
    baseline.write_text(before)
    config.write_text(FILE)
    assert code == 3
    assert all(own["kept"] and own["status"] == "failed" for own in cells.values())
    assert cells["model-onnx"]["reasons"][0].startswith("max-kl = 1e-09 does not hold")
    assert cells["model-coreml"]["reasons"][0].startswith("size went from")


def test_a_fault_in_one_lowering_breaks_that_cell(team: Team) -> None:
    code, cells = team.check("--fresh", site=FAULT)
    assert code == 3
    assert cells["model-onnx"]["status"] == "failed"
    assert "parity rung 3 failed" in cells["model-onnx"]["reasons"][0]
    assert "lfm.swiglu" in cells["model-onnx"]["reasons"][1]
    assert cells["model-onnx"]["place"]["layer"] == 0
    assert cells["model-onnx"]["bundle"] is None
    assert cells["model-coreml"]["status"] == "passed"


def test_a_runtime_that_is_not_there_is_said(team: Team) -> None:
    gone = "import sys\nsys.modules['coremltools'] = None\n"
    code, cells = team.check("--fresh", "--only", "model-coreml", site=gone)
    assert code == 4  # nothing was proven
    assert cells["model-coreml"]["status"] == "skipped"
    assert "coremltools" in cells["model-coreml"]["reasons"][0]


def test_a_checkpoint_that_changed_is_exported_again(team: Team) -> None:
    path = team.folder / "model" / "model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("w1.weight"))
    tensors[name] = tensors[name] + 0.01 * torch.ones_like(tensors[name])
    save_file(tensors, path, {"format": "pt"})
    code, cells = team.check("--only", "model-onnx")
    path.write_bytes(before)
    assert list(cells) == ["model-onnx"]
    assert not cells["model-onnx"]["kept"]
    known = json.loads((team.folder / "lfmc-baseline.json").read_text())["cells"]["model-onnx"]
    assert cells["model-onnx"]["fingerprint"] != known["fingerprint"]
    assert code in (0, 3)
