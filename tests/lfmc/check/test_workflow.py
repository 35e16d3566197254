"""The reusable workflow: its steps, run here as a runner would, but for what pip would fetch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lfmc.check.report import JSON, JUNIT, SUMMARY
from tests.factories import save_tiny_checkpoint

WORKFLOWS = Path(__file__).parents[3] / ".github" / "workflows"
SHARED = yaml.safe_load((WORKFLOWS / "lfmc-check.yml").read_text())
INPUTS = SHARED[True]["workflow_call"]["inputs"]  # YAML reads the key `on` as true


def run(step: dict[str, Any], folder: Path, given: dict[str, str], path: str) -> int:
    """A step's exit code; `given` are inputs, the others have their defaults."""

    def value(found: re.Match[str]) -> str:
        name = found[1].removeprefix("inputs.")
        return given.get(name, str(INPUTS[name]["default"]))

    env = {k: re.sub(r"\$\{\{ (\S+) \}\}", value, v) for k, v in step.get("env", {}).items()}
    assert "${{" not in step["run"], "inputs come by the environment: a script is no template"
    env |= {"PATH": path, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    env |= {"LFMC_CACHE": str(folder / "cache"), "GITHUB_STEP_SUMMARY": str(folder / "told.md")}
    command = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env=env, check=False).returncode


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    return {own["name"]: own for own in SHARED["jobs"]["check"]["steps"] if "run" in own}


def test_install_asks_for_the_extras(steps: dict[str, Any], tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > asked\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    given = {"lfmc": ".", "extras": "onnx,coreml", "pip-options": "-c constraints.txt"}
    assert run(steps["Install"], tmp_path, given, path) == 0
    asked = (tmp_path / "asked").read_text().split()
    assert asked == ["-m", "pip", "install", "-c", "constraints.txt", ".[onnx,coreml]"]
    assert run(steps["Install"], tmp_path, {}, path) == 0
    assert (tmp_path / "asked").read_text().split() == ["-m", "pip", "install", "lfmc[onnx]"]


def test_check_and_summary(steps: dict[str, Any], tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model", "lfm2")
    table = '[[export]]\nmodel = "model"\ncontext = 64\ncheck = "fast"\nbits = "4"\n'
    (tmp_path / "own.toml").write_text(table + "max-kl = 1e-9\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert run(steps["Summary"], tmp_path, {}, path) == 0  # where nothing was checked
    given = {"file": "own.toml", "arguments": "--only model-onnx"}
    assert run(steps["Check"], tmp_path, given, path) == 3
    assert {JSON, JUNIT, SUMMARY} == {own.name for own in (tmp_path / "lfmc-report").iterdir()}
    assert run(steps["Summary"], tmp_path, {}, path) == 0
    assert "max-kl = 1e-09 does not hold" in (tmp_path / "told.md").read_text()
    (tmp_path / "own.toml").write_text(table)
    assert run(steps["Check"], tmp_path, given, path) == 0


def test_our_own_ci_calls_it() -> None:
    own = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())["jobs"]["check"]
    assert own["uses"] == "./.github/workflows/lfmc-check.yml"
    assert set(own["with"]) <= set(INPUTS)
