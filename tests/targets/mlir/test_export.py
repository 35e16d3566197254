"""A whole export, and the bundle as an app finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.errors import InputError, UnsupportedError
from lfmc.exporter.export import export
from lfmc.exporter.reverify import reverify
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target
from tests.targets.matrix import assert_example_agrees, export_demo


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the bundled checkpoint, at most 6 bits a weight, for 128 tokens."""
    return export_demo("mlir", tmp_path_factory.mktemp("mlir") / "bundle", 6.0)


def test_the_manifest_says_what_a_host_needs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest["artifact"] == ["model.vmfb", "params.safetensors"]
    assert manifest["not_executed"] is None
    assert (manifest["device"], manifest["dialect"]) == ("cpu", "linalg")
    assert manifest["lengths"] == [64, 8, 1]
    assert "model.mlirbc" in manifest["files"]
    kinds = [state["name"].split("_")[0] for state in manifest["states"]]
    assert (kinds.count("conv"), kinds.count("key"), kinds.count("value")) == (4, 2, 2)


def test_it_is_verified_again_from_its_files(bundle: Bundle) -> None:
    found = reverify(bundle, open_checkpoint(), Silent(), "fast")
    assert found["golden"] == 3
    assert [rung["number"] for rung in found["parity"]] == [1, 2, 3]
    assert lfmc.load(bundle.path).step([1, 2, 3]).shape == (3, 8192)


def test_the_example_says_what_lfmc_says(bundle: Bundle) -> None:
    assert_example_agrees(bundle)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "vulkan", "dialect": "tosa"}, UnsupportedError, "is given 32-bit words"),
        ({"operators": "named"}, UnsupportedError, "linalg has no named operators"),
        ({"device": "tpu"}, InputError, "no such device"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, options: dict[str, str], error: type[Exception], message: str
) -> None:
    asked = Options(bits="4", target_options=options)
    where = tmp_path / "b"
    with pytest.raises(error, match=message):
        export(open_checkpoint(), get_target("mlir"), where, asked, force=False, progress=Silent())
