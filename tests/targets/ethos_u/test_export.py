"""A complete export, and the bundle that a host opens: make test-ethos-u."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.exporter.reverify import reverify
from lfmc.machine.progress import Silent
from tests.targets.matrix import assert_example_agrees

pytestmark = pytest.mark.skipif(
    find_spec("ethosu") is None, reason="Vela is not in this environment: make test-ethos-u"
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    return tiny_bundle("ethos-u", 9.5, activations="int8", chunk="8")


def test_the_manifest_has_the_facts_for_a_host(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest["artifact"] == ["params.safetensors", "host.safetensors"]
    assert (manifest["accelerator"], manifest["activations"]) == ("ethos-u85-256", "int8")
    assert manifest["executed_by"].startswith("TOSA's reference model")
    assert manifest["lengths"] == [1, 8]
    for name, size in manifest["compiled_nbytes"].items():
        assert (bundle.path / name).stat().st_size == size
    sizes = [(bundle.path / name).stat().st_size for name in manifest["artifact"]]
    assert manifest["report"]["plan_nbytes"] == sum(sizes)


def test_a_bundle_is_verified_again(bundle: Bundle, tiny_moe: Checkpoint) -> None:
    report = reverify(bundle, tiny_moe, Silent(), "fast")
    assert report["golden"] == 3
    assert [rung["number"] for rung in report["parity"]] == [1, 2, 3, 3, 3, 3]


def test_the_manifest_has_the_kl_of_8_bits(bundle: Bundle) -> None:
    quality = bundle.manifest["report"]["quality"]
    assert quality["kl"] > 0.0
    assert quality["tokens"] == 2 * 128


def test_the_example_generates_the_same_text(bundle: Bundle) -> None:
    assert_example_agrees(bundle)
