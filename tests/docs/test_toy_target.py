"""The toy target of docs/architecture.md: pip installs it, lfmc exports to it and runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from lfmc.cli import cli
from lfmc.errors import GateError
from lfmc.targets.base import target_names
from tests.docs.blocks import REPO

SOURCE = REPO / "examples" / "toy_target"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip installed the package and its entry point."""
    copy, folder = tmp_path_factory.mktemp("source") / "toy", tmp_path_factory.mktemp("site")
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--target", folder)
    pip = [sys.executable, "-m", "pip", "install", "-q", *options, copy]
    subprocess.run(pip, check=True, capture_output=True)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert "toy" not in target_names()
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("lfmc_toy", None)


@pytest.fixture
def export(
    installed: None, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> Callable[[str], Path]:
    """`export(kind)` runs `lfmc export --target toy` on a tiny checkpoint; returns the bundle."""

    def run(kind: str) -> Path:
        model, output = str(tiny_checkpoint(kind)), str(tmp_path / "out")
        options = ("--bits", "4", "--check", "fast", "--context", "64", "--output", output)
        command = ["export", model, "--target", "toy", *options]
        CliRunner().invoke(cli, command, catch_exceptions=False, standalone_mode=False)
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("kind", ["lfm2_moe", pytest.param("lfm3", marks=pytest.mark.slow)])
def test_parity_and_reading_back_pass(kind: str, export: Callable[[str], Path]) -> None:
    folder = export(kind)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["target"] == "toy"
    report = manifest["report"]
    rungs = {rung["number"]: rung for rung in report["parity"]}
    assert {number for number, rung in rungs.items() if rung["passed"]} == {1, 2, 3}
    assert rungs[3]["worst"] <= 1e-5
    matrices = [tensor for tensor in manifest["tensors"] if tensor["part"] == "codes"]
    sources = {source for tensor in matrices for source in tensor["sources"]}
    assert len(report["measured_errors"]) == len(sources)
    verify = CliRunner().invoke(cli, ["verify", str(folder)], catch_exceptions=False)
    assert "golden prompts" in verify.output
    generate = CliRunner().invoke(cli, ["generate", str(folder), "A house", "--max-tokens", "4"])
    assert generate.exit_code == 0


def test_a_code_that_differs_from_the_plan_is_an_error(
    export: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import lfmc_toy

    save = lfmc_toy.save_file

    def save_with_a_wrong_code(tensors: dict[str, object], *rest: object) -> None:
        codes = next(name for name in tensors if name.endswith(".codes"))
        save({**tensors, codes: tensors[codes] ^ 1}, *rest)  # type: ignore[operator]

    monkeypatch.setattr(lfmc_toy, "save_file", save_with_a_wrong_code)
    with pytest.raises(GateError, match="on disk differ from the plan"):
        export("lfm2_moe")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_check_passes_on_the_bundled_checkpoint(installed: None, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["export", "--target", "toy", "--bits", "auto", "--output", str(output)]
    CliRunner().invoke(cli, command, catch_exceptions=False, standalone_mode=False)
    report = json.loads((output / "manifest.json").read_text())["report"]
    assert report["artifact_nbytes"] <= report["limit_nbytes"]
    assert report["quality"]["kl"] < 0.2
