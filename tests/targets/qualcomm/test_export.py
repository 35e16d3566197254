"""A complete export, and the bundle that an app opens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.exporter.reverify import reverify
from lfmc.machine.progress import Silent
from tests.targets.matrix import assert_example_agrees


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    return tiny_bundle("qualcomm", 11.0, stage="edge", chunk="32")


def test_the_manifest_has_the_facts_for_a_host(bundle: Bundle) -> None:
    manifest = bundle.manifest
    names = ["params.safetensors", "host.safetensors", "decode.qdq.onnx", "prefill.qdq.onnx"]
    assert manifest["artifact"] == names
    assert (manifest["soc"], manifest["activations"]) == ("sm8750", "int16")
    assert manifest["executed_by"].startswith("ONNX Runtime on a CPU")
    assert manifest["lengths"] == [1, 32]
    assert manifest["interface"]["context"] == 128
    kinds = [state["kind"] for state in manifest["interface"]["states"]]
    assert (kinds.count("conv"), kinds.count("key"), kinds.count("value")) == (2, 2, 2)


def test_file_sizes_match_the_plan(bundle: Bundle) -> None:
    sizes = [(bundle.path / name).stat().st_size for name in bundle.manifest["artifact"]]
    assert bundle.manifest["report"]["plan_nbytes"] == sum(sizes)


def test_a_bundle_is_verified_again(bundle: Bundle, tiny_moe: Checkpoint) -> None:
    report = reverify(bundle, tiny_moe, Silent(), "fast")
    assert report["golden"] == 3
    assert [rung["number"] for rung in report["parity"]] == [1, 2, 3, 3, 3]
    assert report["quality"]["kl"] < 0.1
    assert lfmc.load(bundle.path).step([1, 2, 3]).shape == (3, 8192)


def test_the_example_generates_the_same_text(bundle: Bundle) -> None:
    assert_example_agrees(bundle)


def test_doctor_lists_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    from lfmc.targets.base import get_target
    from lfmc.targets.qualcomm import session
    from lfmc.targets.qualcomm.delegate import SDK_ROOT

    monkeypatch.setattr(session, "has_qnn", lambda: False)
    monkeypatch.delenv(SDK_ROOT, raising=False)
    tools = get_target("qualcomm").missing_tools()
    assert list(tools) == ["runtime=onnxruntime", "runtime=executorch"]
    assert "onnxruntime-qnn" in tools["runtime=onnxruntime"][0]
    assert SDK_ROOT in tools["runtime=executorch"][0]
