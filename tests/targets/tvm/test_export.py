"""A whole export, and the bundle as an app loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.exporter.export import export
from lfmc.exporter.reverify import reverify
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    return tiny_bundle("tvm", 10.0)


def test_the_manifest_states_the_requirements_on_a_host(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest["artifact"] == ["model.so", "params.safetensors"]
    assert manifest["not_executed"] is None
    assert manifest["made_for"]["kind"] == "cpu"
    assert manifest["functions"] == ["decode", "prefill", "score", "decode_exact", "score_exact"]
    kinds = [state["name"].split("_")[0] for state in manifest["states"]]
    assert (kinds.count("conv"), kinds.count("key"), kinds.count("value")) == (2, 2, 2)


def test_a_bundle_is_verified_again_from_its_files(bundle: Bundle, tiny_moe: Checkpoint) -> None:
    report = reverify(bundle, tiny_moe, Silent(), "fast")
    assert report["golden"] == 3
    assert [rung["number"] for rung in report["parity"]] == [1, 2, 3, 3, 3, 3]
    assert lfmc.load(bundle.path).step([1, 2, 3]).shape == (3, 8192)


def test_a_library_for_another_cpu_is_read_back_and_not_run(
    tiny_moe: Checkpoint, tmp_path: Path
) -> None:
    options = Options(
        bits="4", context=64, target_options={"device": "cpu:neon-dotprod"}, check="fast"
    )
    target, checkpoint = get_target("tvm"), tiny_moe
    if target.missing_tools().get("device=cpu:neon-dotprod"):
        pytest.skip("no linker for 64-bit Arm: apt-get install g++-aarch64-linux-gnu")
    path = tmp_path / "bundle"
    exported, report = export(checkpoint, target, path, options, force=False, progress=Silent())
    assert exported.manifest["not_executed"].startswith("this machine is no aarch64")
    assert report.verification is not None
    assert [bool(rung.skipped) for rung in report.verification.rungs] == [False, False, True, True]
    reverified = reverify(exported, checkpoint, Silent(), "fast")
    assert "golden" not in reverified
    assert reverified["not_executed"] == exported.manifest["not_executed"]
