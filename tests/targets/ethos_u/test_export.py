"""A whole export, and the bundle as a host finds it: make test-ethos-u."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.exporter.reverify import reverify
from lfmc.machine.progress import Silent
from tests.targets.matrix import assert_example_agrees, export_demo

pytestmark = pytest.mark.skipif(
    find_spec("ethosu") is None, reason="Vela is not in this environment: make test-ethos-u"
)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("lfm2_moe")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Bundle:
    """Of a tiny model of experts, at most 9.5 bits a weight, for 128 tokens."""
    folder = tmp_path_factory.mktemp("ethos-u")
    return export_demo("ethos-u", folder / "bundle", 9.5, model, activations="int8", chunk="8")


def test_the_manifest_says_what_a_host_needs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest["artifact"] == ["params.safetensors", "host.safetensors"]
    assert (manifest["accelerator"], manifest["activations"]) == ("ethos-u85-256", "int8")
    assert manifest["executed_by"].startswith("TOSA's reference model")
    assert manifest["lengths"] == [1, 8]
    for name, size in manifest["compiled_nbytes"].items():
        assert (bundle.path / name).stat().st_size == size
    sizes = [(bundle.path / name).stat().st_size for name in manifest["artifact"]]
    assert manifest["report"]["plan_nbytes"] == sum(sizes)


def test_it_is_verified_again_from_its_files(bundle: Bundle, model: Path) -> None:
    found = reverify(bundle, open_checkpoint(model), Silent(), "fast")
    assert found["golden"] == 3
    assert [rung["number"] for rung in found["parity"]] == [1, 2, 3, 3, 3, 3]


def test_it_says_what_8_bits_cost(bundle: Bundle) -> None:
    quality = bundle.manifest["report"]["quality"]
    assert quality["kl"] > 0.0
    assert quality["tokens"] == 2 * 128


def test_the_example_says_what_lfmc_says(bundle: Bundle) -> None:
    assert_example_agrees(bundle)
