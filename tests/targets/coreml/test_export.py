"""A whole export of the bundled checkpoint, and the bundle as an app finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.calib_free.make_plan import Budget
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.exporter.export import export
from lfmc.exporter.reverify import reverify
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("coreml") / "bundle"
    asked = Options(budget=Budget(bits_per_weight=6.0), context=128, check="fast")
    made, report = export(
        open_checkpoint(), get_target("coreml"), output, asked, force=False, progress=Silent()
    )
    assert report.verification is not None
    assert report.nbytes <= (report.plan.limit_nbytes or 0)
    return made


def test_the_manifest_says_what_an_app_needs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest["functions"] == {"decode": 1, "prefill": 64}
    assert manifest["minimum_deployment_target"] == "iOS18"
    assert [trouble["link"][-4:] for trouble in manifest["known_troubles"]] == ["2716"]
    config = open_checkpoint().config
    conv = [state for state in manifest["states"] if state["name"].startswith("conv")]
    assert len(conv) == config.layer_types.count("conv")
    assert conv[0]["shape"] == [1, config.conv_kernel - 1, config.hidden_size]
    assert {state["kept_by"] for state in manifest["states"]} == {"MLState"}
    widths = {row["bits"] for row in _experts(bundle)}
    assert widths == {4, 8}


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
    functions = {function.name: function for function in spec.description.functions}
    assert [feature.name for feature in functions["prefill"].input] == [
        "input_ids",
        "position",
        "valid",
    ]
    for function in functions.values():
        assert all(feature.shortDescription for feature in (*function.input, *function.output))
        named = {state.name for state in function.state}
        assert named == {state["name"] for state in bundle.manifest["states"]}


def test_it_loads_and_verifies(bundle: Bundle) -> None:
    model = lfmc.load(bundle.path)
    first = model.step([1, 5, 9])
    assert first.shape == (3, open_checkpoint().config.vocab_size)
    model.reset()
    assert torch.equal(model.step([1, 5, 9]), first)
    found = reverify(bundle, open_checkpoint(), Silent(), "fast")
    assert found["golden"] > 0


def test_a_folder_without_its_package_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    from lfmc.errors import InputError

    with pytest.raises(InputError, match="no Core ML package"):
        get_target("coreml").run(tmp_path)
