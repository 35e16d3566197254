from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.plan.channel_gains import input_gain_name, input_importance
from lfmc.calib_free.plan.roles import FLOAT_ROLES, QUANTIZED_ROLES, quantization_units, tensor_role
from lfmc.checkpoint.checkpoint import Checkpoint
from tests.calib_free.conftest import MakeCheckpoint

MERGED = replace(GENERIC, merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")))


def test_every_tensor_of_every_generation_has_a_role(make_checkpoint: MakeCheckpoint) -> None:
    roles: Counter[str] = Counter()
    for model_type in ("lfm2", "lfm2_moe", "lfm3"):
        checkpoint = make_checkpoint(
            model_type, conv_bias=True, attention_bias=True, tie_word_embeddings=False
        )
        roles.update(tensor_role(name, info.shape) for name, info in checkpoint.tensors.items())
    assert set(roles) == {*QUANTIZED_ROLES, *FLOAT_ROLES}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (64, 32), "embedding"),
        ("lm_head.weight", (64, 32), "head"),
        ("model.layers.0.conv.conv.weight", (32, 1, 3), "conv"),
        ("model.layers.0.conv.in_proj.bias", (96,), "bias"),
        ("model.layers.2.feed_forward.gate.weight", (4, 32), "router"),
        ("model.layers.2.feed_forward.expert_bias", (4,), "expert_bias"),
        ("model.layers.2.feed_forward.experts.3.w2.weight", (32, 16), "expert"),
        ("model.layers.2.self_attn.gate_proj.weight", (2, 32), "gate"),
        ("model.layers.2.self_attn.q_layernorm.weight", (16,), "norm"),
        ("model.layers.2.feed_forward.w2.weight", (32, 48), "linear"),
    ],
)
def test_the_role_of_a_tensor(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert tensor_role(name, shape) == expected


def test_an_unknown_tensor_has_no_role() -> None:
    with pytest.raises(ValueError, match="no known role"):
        tensor_role("model.layers.0.mystery.weight", (3, 3))


@pytest.mark.parametrize(
    ("expert_unit", "count", "kinds"),
    [
        ("matrix", 5 * 8 * 2, {"experts.w1+w3", "experts.w2"}),
        ("expert", 5 * 8, {"experts.w1+w2+w3"}),
        ("layer", 5, {"experts.w1+w2+w3"}),
    ],
)
def test_experts_are_grouped_by_unit(
    demo: Checkpoint, expert_unit: str, count: int, kinds: set[str]
) -> None:
    capabilities = replace(GENERIC, expert_unit=expert_unit)  # type: ignore[arg-type]
    experts = [unit for unit in quantization_units(demo, capabilities) if unit.experts is not None]
    assert len(experts) == count
    assert {unit.kind for unit in experts} == kinds
    assert sum(len(unit.names) for unit in experts) == 5 * 8 * 3


def test_merged_projections_are_one_unit(demo: Checkpoint) -> None:
    separate, merged = quantization_units(demo, GENERIC), quantization_units(demo, MERGED)
    qkv = next(unit for unit in merged if unit.kind.startswith("self_attn.q_proj"))
    assert qkv.kind == "self_attn.q_proj+k_proj+v_proj"
    assert qkv.layer == 2
    assert len(merged) == len(separate) - 2 * 2 - 1  # two attention layers, one dense layer
    assert sorted(name for unit in separate for name in unit.names) == sorted(
        name for unit in merged for name in unit.names
    )


def test_a_tied_head_is_the_embedding(make_checkpoint: MakeCheckpoint) -> None:
    tied = make_checkpoint("lfm2")
    untied = make_checkpoint("lfm2", tie_word_embeddings=False)
    assert {unit.role for unit in quantization_units(tied, GENERIC)} == {"embedding", "linear"}
    assert {unit.role for unit in quantization_units(untied, GENERIC)} == {
        "embedding",
        "linear",
        "head",
    }


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("model.layers.0.conv.in_proj.weight", "model.layers.0.operator_norm.weight"),
        ("model.layers.2.self_attn.v_proj.weight", "model.layers.2.operator_norm.weight"),
        ("model.layers.0.feed_forward.w3.weight", "model.layers.0.ffn_norm.weight"),
        ("model.layers.1.feed_forward.experts.7.w1.weight", "model.layers.1.ffn_norm.weight"),
        ("model.layers.1.feed_forward.gate.weight", "model.layers.1.ffn_norm.weight"),
        ("model.embed_tokens.weight", "model.embedding_norm.weight"),
        ("model.layers.0.conv.out_proj.weight", None),
        ("model.layers.2.self_attn.out_proj.weight", None),
        ("model.layers.1.feed_forward.experts.7.w2.weight", None),
    ],
)
def test_the_norm_before_a_matrix(demo: Checkpoint, name: str, gain: str | None) -> None:
    assert input_gain_name(demo, name) == gain
    importance = input_importance(demo, name)
    if gain is None:
        assert importance is None
    else:
        assert importance is not None
        assert importance.tolist() == demo.load(gain).float().square().tolist()


def test_an_untied_embedding_has_no_norm_before_it(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2", tie_word_embeddings=False)
    assert input_gain_name(checkpoint, "model.embed_tokens.weight") is None
    assert input_gain_name(checkpoint, "lm_head.weight") == "model.embedding_norm.weight"
