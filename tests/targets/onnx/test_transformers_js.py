"""The `transformers.js` layout: names, settings, and a graph that browsers' runtimes have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError
from lfmc.targets.base import get_target
from lfmc.targets.onnx.emitter import Emitter, model_path
from lfmc.targets.onnx.lookup import lookup
from lfmc.targets.onnx.transformers_js import settings
from tests.targets.lowering import Lowered, for_browsers

Make = Callable[..., Lowered]
LAYOUT = {"layout": "transformers.js"}


@pytest.fixture(scope="module")
def build(lowered: Make) -> Lowered:
    return lowered("lfm2_moe", for_browsers, **LAYOUT)


@pytest.fixture(scope="module")
def graph(build: Lowered) -> Any:
    return onnx.load(model_path(build.folder), load_external_data=False).graph


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An export of the bundled checkpoint, without parity."""
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    return lfmc.export(output=output, bits="4", check="off", context=64, target_options=LAYOUT)


def test_files_have_the_names_that_transformers_js_loads(build: Lowered, graph: Any) -> None:
    assert build.artifact.files == ("onnx/model.onnx", "onnx/model.onnx_data")
    assert {p.name for p in (build.folder / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    entries = [e for tensor in graph.initializer for e in tensor.external_data]
    assert {e.value for e in entries if e.key == "location"} == {"model.onnx_data"}


def test_only_the_batch_dim_of_a_new_state_is_not_0(graph: Any) -> None:
    """transformers.js creates states with the batch size, and 0 for every dim of another name."""
    inputs = {v.name: v.type.tensor_type for v in graph.input}
    shapes = {n: [d.dim_param or d.dim_value for d in t.shape.dim] for n, t in inputs.items()}
    assert shapes["input_ids"] == ["batch_size", "time"]
    assert shapes["num_logits_to_keep"] == []
    assert shapes["past_conv.0"] == ["batch_size", 64, 3]
    assert shapes["past_key_values.1.key"] == ["batch_size", 2, "past", 16]


def test_no_constant_has_16_bits(graph: Any) -> None:
    """WebGPU without 16-bit floats can't load such a constant or its Cast."""
    types = {tensor.data_type for tensor in graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8, onnx.TensorProto.INT64}
    constants = {tensor.name for tensor in graph.initializer}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert not [node for node in casts if node.input[0] in constants]


def test_experts_use_only_what_qmoe_has_on_webgpu_and_in_node(graph: Any) -> None:
    nodes = [node for node in graph.node if node.op_type == "QMoE"]
    widths = [a.i for node in nodes for a in node.attribute if a.name == "expert_weight_bits"]
    assert sorted(set(widths)) == [4, 8]
    for node in nodes:
        assert "accuracy_level" not in {attribute.name for attribute in node.attribute}
        assert len(node.input) == 7  # no zero points and no separate router weights


def test_the_lookup_needs_no_operator_that_wasm_lacks(graph: Any) -> None:
    assert "GatherBlockQuantized" not in {node.op_type for node in graph.node}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_lookup_returns_dequantized_rows(bits: int, symmetric: bool, tmp_path: Path) -> None:
    grid = "signed" if symmetric else "minmax"
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(bits))
    table = quantize(weight, Format(bits, 32, symmetric, "float32"), None, grid)
    emitter = Emitter(tmp_path)
    ids = emitter.input("ids", ir.DataType.INT64, ["batch", "time"])
    parts = {"codes": table.packed_codes(), "scales": table.scales, "zeros": table.packed_zeros()}
    constants = {
        part: None if value is None else emitter.weight("table", part, (), value, "rows")
        for part, value in parts.items()
    }
    rows = lookup(emitter, ids, *constants.values(), bits, 32, 3)  # type: ignore[arg-type]
    emitter.output(rows, "rows", ["batch", "time", 96])
    emitter.save("lookup", {})
    session = onnxruntime.InferenceSession(str(model_path(tmp_path)))
    actual = session.run(["rows"], {"ids": np.array([[6, 0, 3]])})[0]
    assert torch.equal(torch.from_numpy(actual[0]), table.dequantize()[[6, 0, 3]])


def test_the_caller_chooses_how_many_logits_to_compute(build: Lowered) -> None:
    session = onnxruntime.InferenceSession(str(model_path(build.folder)))
    sizes = {"batch_size": 1, "past": 0}
    feeds: dict[str, Any] = {
        value.name: np.zeros([sizes.get(d, d) for d in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    feeds |= {"input_ids": np.array([[5, 6, 7, 8]]), "attention_mask": np.ones((1, 4), np.int64)}

    def logits(count: int) -> Any:
        counts = {"num_logits_to_keep": np.array(count, np.int64)}
        return session.run(["logits"], {**feeds, **counts})[0]

    assert logits(0).shape == (1, 4, 8192)
    np.testing.assert_allclose(logits(2), logits(0)[:, 2:], atol=1e-5)


def test_a_plan_has_only_formats_of_the_layout(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    config = any_checkpoint("lfm2_moe").config
    capabilities = get_target("onnx").capabilities(config, LAYOUT)
    assert {f.scale_dtype for f in capabilities.linear} == {"float32"}
    assert capabilities.floats == ("float32",)
    assert {(f.bits, f.symmetric) for f in capabilities.expert} == {(4, True), (8, True)}
    lfmc.plan(bits="4").save(tmp_path / "plan.json")  # of the default layout
    with pytest.raises(InputError, match="can't store tensor"):
        lfmc.export(plan=tmp_path / "plan.json", output=tmp_path / "b", target_options=LAYOUT)
    plan = lfmc.plan(bits="4", target_options=LAYOUT)
    assert {row.format for row in plan.rows if row.role == "expert"} == {"int4-g32-sym-float32"}


def test_the_bundle_has_the_settings_of_transformers_js(bundle: Bundle) -> None:
    config = bundle.read_json("config.json")
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": True}
    assert config["layer_types"][:3] == ["conv", "conv", "full_attention"]
    assert bundle.read_json("generation_config.json")["eos_token_id"] == [2, 4]
    tokenizer = bundle.read_json("tokenizer_config.json")
    assert tokenizer["chat_template"] == (bundle.path / "chat_template.jinja").read_text()
    assert tokenizer["bos_token"] == "<|startoftext|>"  # of the checkpoint
    bundle.check_files()
    states = json.loads((bundle.path / "manifest.json").read_text())["states"]
    assert states[0]["shape"][0] == "batch_size"


def test_a_bundle_runs_and_verifies(bundle: Bundle) -> None:
    assert lfmc.verify(bundle.path)["golden"] == 3


def test_a_language_tower_gets_a_configuration_of_its_own(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    config = settings(any_checkpoint("lfm3_vl"))["config.json"]
    assert config["model_type"] == "lfm3"
    assert config["architectures"] == ["Lfm3ForCausalLM"]
    assert config["hidden_size"] == 64


def test_other_layouts_keep_the_files_of_the_checkpoint(lowered: Make) -> None:
    build = lowered("lfm2_moe", for_browsers)
    assert build.artifact.settings == {}
    assert build.artifact.files == ("model.onnx", "model.onnx.data")
