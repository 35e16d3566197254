"""The files on disk: bytes, codes, scales, names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from lfmc.errors import GateError, InputError
from lfmc.targets.onnx.emitter import ALIGNMENT, DATA_FILE, MODEL_FILE
from lfmc.targets.onnx.readback import read_initializer
from lfmc.verification.readback import read_back
from tests.targets.lowering import (
    Choose,
    Lowered,
    floats,
    for_browsers,
    four_bit,
    mixed,
    two_bit,
    wide_groups,
)

Make = Callable[..., Lowered]
ARTIFACTS: list[tuple[str, Choose, str]] = [
    ("lfm2-moe-8m", mixed, "plain"),
    ("lfm2_moe", mixed, "plain"),
    ("lfm2_moe", floats, "plain"),
    ("lfm2_moe-no-bias", for_browsers, "transformers.js"),
    ("lfm3", for_browsers, "transformers.js"),
    ("lfm2", wide_groups, "genai"),
    ("lfm2-untied", two_bit, "plain"),
    ("lfm3", four_bit, "plain"),
]


@pytest.mark.parametrize(("name", "choose", "layout"), ARTIFACTS)
def test_tensors_on_disk_match_the_plan(
    lowered: Make, name: str, choose: Choose, layout: str
) -> None:
    build = lowered(name, choose, layout=layout)
    errors = read_back(build, build.folder, build.artifact)
    quantized = {row.name for row in build.plan.rows if row.format.startswith("int")}
    assert set(errors) == quantized
    stored = sum(tensor.nbytes for tensor in build.artifact.tensors)
    assert stored == sum(row.nbytes for row in build.plan.rows)
    sources = [source for t in build.artifact.tensors for source in t.sources]
    assert set(sources) == set(build.checkpoint.tensors)


@pytest.mark.parametrize(("name", "choose", "layout"), ARTIFACTS)
def test_the_graph_fits_its_reserve(lowered: Make, name: str, choose: Choose, layout: str) -> None:
    build = lowered(name, choose, layout=layout)
    files = sum((build.folder / file).stat().st_size for file in build.artifact.files)
    tensors = sum(row.nbytes for row in build.plan.rows)
    capabilities = build.target.capabilities(build.checkpoint.config, build.request.options)
    assert files - tensors <= capabilities.graph_nbytes


def test_a_changed_code_is_named(lowered: Make, tmp_path: Path) -> None:
    build = lowered("lfm2-moe-8m", mixed)
    for file in build.artifact.files:
        shutil.copy(build.folder / file, tmp_path / file)
    data = bytearray((tmp_path / DATA_FILE).read_bytes())
    data[len(data) // 2] ^= 0x10
    (tmp_path / DATA_FILE).write_bytes(data)
    with pytest.raises(GateError, match="on disk differ from the plan"):
        read_back(build, tmp_path, build.artifact)


def test_an_unknown_constant_is_refused(lowered: Make) -> None:
    build = lowered("lfm2-moe-8m", mixed)
    with pytest.raises(InputError, match="has no constant"):
        read_initializer(build.folder, "model.layers.99.weight")


def test_nothing_large_is_in_the_graph_file(lowered: Make) -> None:
    model = onnx.load(lowered("lfm3", four_bit).folder / MODEL_FILE, load_external_data=False)
    embedded = [t for t in model.graph.initializer if not t.external_data]
    assert embedded
    assert max(len(t.raw_data) for t in embedded) <= 256  # rotary steps and shapes, no tables
    for tensor in model.graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        assert int(facts.get("offset", 0)) % ALIGNMENT == 0


@pytest.mark.parametrize(
    ("name", "choose", "layout", "conv", "shape"),
    [
        ("lfm2-moe-8m", mixed, "plain", "past_conv.0", ["batch", 2, 256]),
        ("lfm2", wide_groups, "genai", "past.0.conv", ["batch", 64, 2]),
    ],
)
def test_names_and_state_shapes_of_layouts(
    lowered: Make, name: str, choose: Choose, layout: str, conv: str, shape: list[object]
) -> None:
    build = lowered(name, choose, layout=layout)
    model = onnx.load(build.folder / MODEL_FILE, load_external_data=False)
    inputs = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert inputs[conv] == shape
    assert inputs["input_ids"] == ["batch", "time"]
    outputs = {value.name for value in model.graph.output}
    assert "logits" in outputs
    assert conv.replace("past", "present", 1) in outputs
    states = build.artifact.facts["states"]
    assert {state["input"] for state in states} <= set(inputs)
    assert {state["output"] for state in states} <= outputs
    assert len(states) == len(outputs) - 1 == len(inputs) - 2
