"""A whole export, and the bundle as an app finds it."""

from __future__ import annotations

import pytest

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.exporter.reverify import reverify
from lfmc.machine.progress import Silent
from tests.targets.matrix import assert_example_agrees, export_demo


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the bundled checkpoint, at most 7 bits a weight, for 128 tokens."""
    folder = tmp_path_factory.mktemp("qualcomm")
    return export_demo("qualcomm", folder / "bundle", 7.0, stage="edge", chunk="32")


def test_the_manifest_says_what_a_host_needs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    names = ["params.safetensors", "host.safetensors", "decode.qdq.onnx", "prefill.qdq.onnx"]
    assert manifest["artifact"] == names
    assert (manifest["soc"], manifest["activations"]) == ("sm8750", "int16")
    assert manifest["executed_by"].startswith("ONNX Runtime on a CPU")
    assert manifest["lengths"] == [1, 32]
    assert manifest["interface"]["context"] == 128
    kinds = [state["kind"] for state in manifest["interface"]["states"]]
    assert (kinds.count("conv"), kinds.count("key"), kinds.count("value")) == (4, 2, 2)


def test_its_bytes_are_the_plans(bundle: Bundle) -> None:
    sizes = [(bundle.path / name).stat().st_size for name in bundle.manifest["artifact"]]
    assert bundle.manifest["report"]["plan_nbytes"] == sum(sizes)


def test_it_is_verified_again_from_its_files(bundle: Bundle) -> None:
    found = reverify(bundle, open_checkpoint(), Silent(), "fast")
    assert found["golden"] == 3
    assert [rung["number"] for rung in found["parity"]] == [1, 2, 3, 3, 3]
    assert found["quality"]["kl"] < 0.1
    assert lfmc.load(bundle.path).step([1, 2, 3]).shape == (3, 8192)


def test_the_example_says_what_lfmc_says(bundle: Bundle) -> None:
    assert_example_agrees(bundle)


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lfmc.targets.base import get_target
    from lfmc.targets.qualcomm import session
    from lfmc.targets.qualcomm.delegate import SDK_ROOT

    monkeypatch.setattr(session, "has_qnn", lambda: False)
    monkeypatch.delenv(SDK_ROOT, raising=False)
    tools = get_target("qualcomm").missing_tools()
    assert list(tools) == ["runtime=onnxruntime", "runtime=executorch"]
    assert "onnxruntime-qnn" in tools["runtime=onnxruntime"][0]
    assert SDK_ROOT in tools["runtime=executorch"][0]
