"""An export to a bundle, and the bundle's contents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import InputError, UnsupportedError
from lfmc.exporter.export import export
from lfmc.exporter.reverify import reverify
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target
from tests.targets.matrix import assert_example_agrees


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    return tiny_bundle("mlir", 12.0)


def test_the_manifest_contains_what_a_host_needs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest["artifact"] == ["model.vmfb", "params.safetensors"]
    assert manifest["not_executed"] is None
    assert (manifest["device"], manifest["dialect"]) == ("cpu", "linalg")
    assert manifest["lengths"] == [64, 8, 1]
    assert "model.mlirbc" in manifest["files"]
    kinds = [state["name"].split("_")[0] for state in manifest["states"]]
    assert (kinds.count("conv"), kinds.count("key"), kinds.count("value")) == (2, 2, 2)


def test_the_bundle_is_verified_again_from_its_files(bundle: Bundle, tiny_moe: Checkpoint) -> None:
    verification = reverify(bundle, tiny_moe, Silent(), "fast")
    assert verification["golden"] == 3
    assert [rung["number"] for rung in verification["parity"]] == [1, 2, 3]
    assert lfmc.load(bundle.path).step([1, 2, 3]).shape == (3, 8192)


def test_the_example_generates_the_text_of_lfmc(bundle: Bundle) -> None:
    assert_example_agrees(bundle)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "vulkan", "dialect": "tosa"}, UnsupportedError, "reads 32-bit words"),
        (
            {"operators": "named"},
            UnsupportedError,
            "dialect linalg does not support named operators",
        ),
        ({"device": "tpu"}, InputError, "no such device"),
    ],
)
def test_incompatible_options_are_refused(
    tmp_path: Path, options: dict[str, str], error: type[Exception], message: str
) -> None:
    request = Options(bits="4", target_options=options)
    output = tmp_path / "b"
    with pytest.raises(error, match=message):
        export(
            open_checkpoint(), get_target("mlir"), output, request, force=False, progress=Silent()
        )
