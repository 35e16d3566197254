"""The reusable workflow: its steps, run as a CI runner would, except for pip's downloads."""

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
WORKFLOW = yaml.safe_load((WORKFLOWS / "lfmc-check.yml").read_text())
INPUTS = WORKFLOW[True]["workflow_call"]["inputs"]  # YAML reads the key `on` as true


def run(step: dict[str, Any], folder: Path, inputs: dict[str, str], path: str) -> int:
    """Return a step's exit code; inputs that are not in `inputs` have their defaults."""

    def value(match: re.Match[str]) -> str:
        name = match[1].removeprefix("inputs.")
        return inputs.get(name, str(INPUTS[name]["default"]))

    env = {k: re.sub(r"\$\{\{ (\S+) \}\}", value, v) for k, v in step.get("env", {}).items()}
    assert "${{" not in step["run"], "scripts must read inputs from environment variables"
    env |= {"PATH": path, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    env |= {"LFMC_CACHE": str(folder / "cache"), "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    command = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env=env, check=False).returncode


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    """The workflow's steps with a script, by name."""
    return {step["name"]: step for step in WORKFLOW["jobs"]["check"]["steps"] if "run" in step}


def test_install_requires_the_extras(steps: dict[str, Any], tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > arguments\n')
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    inputs = {"lfmc": ".", "extras": "onnx,coreml", "pip-options": "-c constraints.txt"}
    assert run(steps["Install"], tmp_path, inputs, path) == 0
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments == ["-m", "pip", "install", "-c", "constraints.txt", ".[onnx,coreml]"]
    assert run(steps["Install"], tmp_path, {}, path) == 0
    assert (tmp_path / "arguments").read_text().split() == ["-m", "pip", "install", "lfmc[onnx]"]


def test_check_and_summary(steps: dict[str, Any], tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model", "lfm2")
    table = '[[export]]\nmodel = "model"\ncontext = 64\ncheck = "fast"\nbits = "4"\n'
    (tmp_path / "cells.toml").write_text(table + "max-kl = 1e-9\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert run(steps["Summary"], tmp_path, {}, path) == 0  # without a report
    inputs = {"file": "cells.toml", "arguments": "--only model-onnx"}
    assert run(steps["Check"], tmp_path, inputs, path) == 3
    assert {JSON, JUNIT, SUMMARY} == {file.name for file in (tmp_path / "lfmc-report").iterdir()}
    assert run(steps["Summary"], tmp_path, {}, path) == 0
    assert "max-kl = 1e-09 is not met" in (tmp_path / "summary.md").read_text()
    (tmp_path / "cells.toml").write_text(table)
    assert run(steps["Check"], tmp_path, inputs, path) == 0


def test_the_ci_of_lfmc_calls_the_workflow() -> None:
    job = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())["jobs"]["check"]
    assert job["uses"] == "./.github/workflows/lfmc-check.yml"
    assert set(job["with"]) <= set(INPUTS)
