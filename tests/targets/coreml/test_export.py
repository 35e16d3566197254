"""A full export of the bundled checkpoint, and the bundle that an app opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.exporter.reverify import reverify
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    return tiny_bundle("coreml", 8.5)


def test_the_manifest_has_what_an_app_needs(bundle: Bundle, tiny_moe: Checkpoint) -> None:
    manifest = bundle.manifest
    assert manifest["functions"] == {"decode": 1, "prefill": 64}
    assert manifest["minimum_deployment_target"] == "iOS18"
    assert [trouble["link"][-4:] for trouble in manifest["known_troubles"]] == ["2716", "2631"]
    config = tiny_moe.config
    conv = [state for state in manifest["states"] if state["name"].startswith("conv")]
    assert len(conv) == config.layer_types.count("conv")
    assert conv[0]["shape"] == [1, config.conv_kernel - 1, config.hidden_size]
    assert {state["kept_by"] for state in manifest["states"]} == {"MLState"}
    widths = {row["bits"] for row in _experts(bundle)}
    assert len(widths) > 1  # experts differ, whatever the widths are on this CPU


def _experts(bundle: Bundle) -> list[dict[str, int]]:
    rows = bundle.read_json("plan.json")["rows"]
    return [{"bits": int(row["format"][3])} for row in rows if row["role"] == "expert"]


def test_the_package_describes_itself(bundle: Bundle) -> None:
    from lfmc.targets.coreml.library import coremltools

    spec = coremltools().utils.load_spec(str(bundle.path / bundle.manifest["package"]))
    assert spec.specificationVersion == 9  # iOS 18
    assert spec.description.defaultFunctionName == "decode"
    assert "lfm2_moe" in spec.description.metadata.shortDescription
    assert spec.description.metadata.versionString == lfmc.__version__
    assert bundle.manifest["model"]["name"] in spec.description.metadata.author
    assert spec.description.metadata.license == "not stated by the checkpoint"
    functions = {function.name: function for function in spec.description.functions}
    assert [feature.name for feature in functions["prefill"].input] == [
        "input_ids",
        "position",
        "valid",
    ]
    for function in functions.values():
        assert all(feature.shortDescription for feature in (*function.input, *function.output))
        states = {state.name for state in function.state}
        assert states == {state["name"] for state in bundle.manifest["states"]}


def test_the_bundle_loads_and_verifies(bundle: Bundle, tiny_moe: Checkpoint) -> None:
    model = lfmc.load(bundle.path)
    first = model.step([1, 5, 9])
    assert first.shape == (3, tiny_moe.config.vocab_size)
    model.reset()
    assert torch.equal(model.step([1, 5, 9]), first)
    results = reverify(bundle, tiny_moe, Silent(), "fast")
    assert results["golden"] > 0


def test_a_folder_without_its_package_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    from lfmc.errors import InputError

    with pytest.raises(InputError, match="no Core ML package"):
        get_target("coreml").run(tmp_path)
