"""Reading `config.json`: the same values as transformers, or an error that names the key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

from lfmc.errors import InputError
from lfmc.model import read_config, state_specs
from lfmc.model.rope import inverse_frequencies
from tests.factories import KINDS

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HYBRID = ["conv", "full_attention", "conv", "full_attention"]


def raw_config(model_type: str, **changes: Any) -> dict[str, Any]:
    layers = {} if model_type == "lfm3" else {"layer_types": HYBRID}
    return {"model_type": model_type, **SIZES, **layers, **changes}


def error_message(raw: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        read_config(raw, "here/config.json")
    assert caught.value.exit_code == 2
    assert "here/config.json" in str(caught.value)
    return str(caught.value)


def ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe", "lfm3"])
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    layers = {"num_hidden_layers": 8, "layer_types": HYBRID * 2}
    raw = {**raw_config(model_type), **layers}
    if model_type == "lfm3":
        del raw["layer_types"]
    config, expected = read_config(raw), transformers.AutoConfig.for_model(**raw)
    assert config.layer_types == tuple(expected.layer_types)
    assert config.conv_kernel == expected.conv_L_cache
    assert config.conv_bias == expected.conv_bias
    assert config.norm_eps == expected.norm_eps
    assert config.tied_embedding == expected.tie_word_embeddings
    assert config.max_context == expected.max_position_embeddings
    assert config.bos_id == expected.bos_token_id
    assert config.pad_id == expected.pad_token_id
    assert config.eos_ids == ids(expected.eos_token_id)
    assert config.head_dim == getattr(expected, "head_dim", 16)
    if model_type == "lfm2_moe":
        assert config.moe is not None
        assert config.moe.num_experts == expected.num_experts
        assert config.moe.top_k == expected.num_experts_per_tok
        assert config.moe.ffn_size == expected.moe_intermediate_size
        assert config.moe.num_dense_layers == expected.num_dense_layers
        assert config.moe.normalize == expected.norm_topk_prob
        assert config.moe.use_bias == expected.use_expert_bias
        assert config.moe.scale == expected.routed_scaling_factor
    if model_type == "lfm3":
        assert config.sliding_window == expected.sliding_window
        assert config.sandwich_norm == expected.use_sandwich_norm
        assert config.attention_gate == expected.use_attention_gate
        assert config.attention_bias == expected.attention_bias
        for kind, rope in config.rope.items():
            assert rope.theta == expected.rope_parameters[kind]["rope_theta"]
            assert rope.partial == expected.rope_parameters[kind].get("partial_rotary_factor", 1.0)
    else:
        assert config.rope["full_attention"].theta == expected.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_transformers_writes(kind: str) -> None:
    fields = {k: v for k, v in KINDS[kind].items() if k != "vision"}
    saved = transformers.AutoConfig.for_model(**fields).to_diff_dict()
    assert read_config(saved) == read_config(fields)


@pytest.mark.parametrize("multiplier", [1.0, 1, 1.3, 0.7])
@pytest.mark.parametrize("multiple", [32, 256])
@pytest.mark.parametrize("size", [96, 1000, 12288])
def test_the_adjusted_feed_forward_size(size: int, multiple: int, multiplier: float) -> None:
    changes = {
        "intermediate_size": size,
        "block_multiple_of": multiple,
        "block_ffn_dim_multiplier": multiplier,
    }
    config = transformers.Lfm2Config(**SIZES | {"layer_types": HYBRID, "intermediate_size": size})
    config.block_multiple_of, config.block_ffn_dim_multiplier = multiple, multiplier
    with torch.device("meta"):
        expected = Lfm2MLP(config).w1.weight.shape[0]
    assert read_config(raw_config("lfm2", **changes)).ffn_size == expected


def test_a_feed_forward_size_under_its_older_name() -> None:
    raw = raw_config("lfm2", block_ff_dim=200, block_auto_adjust_ff_dim=False)
    assert transformers.Lfm2Config(**raw).intermediate_size == 200
    assert read_config(raw).ffn_size == 200
    del raw["intermediate_size"]
    assert read_config(raw).ffn_size == 200


def test_attention_layers_by_index() -> None:
    raw = raw_config("lfm2", full_attn_idxs=[1, 3])
    del raw["layer_types"]
    assert list(read_config(raw).layer_types) == HYBRID


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 7.0}},
    ],
)
def test_the_rotary_base_is_read_from_every_key(changes: dict[str, Any]) -> None:
    raw = raw_config("lfm2", **changes)
    expected = transformers.Lfm2Config(**raw_config("lfm2", **changes)).rope_parameters
    assert read_config(raw).rope["full_attention"].theta == expected["rope_theta"] == 5e5


def test_partial_rotary_frequencies() -> None:
    frequencies = inverse_frequencies(read_config(raw_config("lfm3")), "full_attention")
    assert frequencies.shape == (64,)
    assert bool((frequencies[:32] > 0).all())
    assert not frequencies[32:].any()


def test_a_vision_language_model_has_the_config_of_its_language_tower() -> None:
    text = raw_config("lfm3")
    outer = {"model_type": "lfm3_vl", "text_config": text, "vision_config": {}}
    assert read_config(outer) == read_config(text)


@pytest.mark.parametrize("key", ["tie_word_embeddings", "tie_embedding"])
def test_the_outer_config_of_a_vision_language_model_decides_tying(key: str) -> None:
    text = raw_config("lfm2", tie_word_embeddings=True)
    outer = {"model_type": "lfm2_vl", "text_config": text, key: False}
    assert not transformers.Lfm2VlConfig(**{**outer, "text_config": text}).tie_word_embeddings
    assert not read_config(outer).tied_embedding


@pytest.mark.parametrize(
    ("model_type", "changes", "key"),
    [
        ("lfm2", {"hidden_size": None}, "hidden_size"),
        ("lfm2", {"hidden_size": "64"}, "hidden_size"),
        ("lfm2", {"hidden_size": True}, "hidden_size"),
        ("lfm2", {"vocab_size": 0}, "vocab_size"),
        ("lfm2", {"vocab_size": 10**30}, "vocab_size"),
        ("lfm2", {"num_hidden_layers": 5}, "layer_types"),
        ("lfm3", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("lfm2", {"layer_types": ["conv"] * 3 + ["sliding_attention"]}, "sliding_attention"),
        ("lfm2", {"layer_types": ["conv"] * 3 + [{}]}, "{}"),
        ("lfm2", {"layer_types": ["conv"] * 4}, "no attention layer"),
        ("lfm2_moe", {"num_experts": 1, "num_experts_per_tok": 1}, "one expert"),
        ("lfm2_moe", {"layer_types": None}, "layer_types"),
        ("lfm2", {"num_key_value_heads": 3}, "3 key/value heads"),
        ("lfm2", {"num_attention_heads": 128, "num_key_value_heads": 128}, "head_dim"),
        ("lfm3", {"head_dim": 31}, "head_dim"),
        ("lfm3", {"head_dim": "32"}, "head_dim"),
        ("lfm3", {"sliding_window": None, "num_hidden_layers": 8}, "sliding_window"),
        ("lfm2", {"conv_L_cache": 1}, "conv_L_cache"),
        ("lfm2", {"norm_eps": float("nan")}, "norm_eps"),
        ("lfm2", {"norm_eps": -1e-5}, "norm_eps"),
        ("lfm2", {"norm_eps": "1e-5"}, "norm_eps"),
        ("lfm2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("lfm2", {"eos_token_id": "</s>"}, "eos_token_id"),
        ("lfm2", {"eos_token_id": [2, None]}, "eos_token_id"),
        ("lfm2", {"rope_parameters": [1]}, "rope_parameters"),
        ("lfm2", {"rope_theta": float("inf")}, "rope_theta"),
        ("lfm2", {"block_ffn_dim_multiplier": 1e20}, "feed-forward"),
        ("lfm2_moe", {"num_experts": 2}, "4 of 2"),
        ("lfm2_moe", {"num_dense_layers": 5}, "num_dense_layers"),
        ("lfm2_moe", {"routed_scaling_factor": "1"}, "routed_scaling_factor"),
        ("lfm2_vl", {}, "text_config"),
        ("gpt2", {}, "'gpt2'"),
        (["lfm2"], {}, "['lfm2']"),
    ],
)
def test_an_error_names_the_bad_value(model_type: Any, changes: dict[str, Any], key: str) -> None:
    assert key in error_message(raw_config(model_type, **changes))


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(
        ["conv", "full_attention", "default", "proportional", "linear", "yarn", "llama3"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
_KEYS = sorted(
    {
        *(key for kind in KINDS.values() for key in kind if key != "vision"),
        *("bos_token_id", "conv_bias", "conv_L_cache", "full_attn_idxs", "norm_eps"),
        *("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor"),
        *(
            "architectures",
            "tie_embedding",
            "block_ff_dim",
            "block_ffn_dim_multiplier",
            "text_config",
        ),
    }
)
_ROPE = st.dictionaries(
    st.sampled_from(
        [
            *("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"),
            *("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
            *("mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor"),
        ]
    ),
    _JSON,
)


@settings(max_examples=250, deadline=None)
@given(
    kind=st.sampled_from(["lfm2", "lfm2_moe", "lfm3"]),
    changes=st.dictionaries(st.sampled_from(_KEYS), _JSON, min_size=1, max_size=3),
    rope=st.none() | _ROPE,
)
def test_any_json_is_read_or_is_an_input_error(
    kind: str, changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    raw = {**KINDS[kind], **changes}
    if rope is not None:
        nested = {"full_attention": rope, "sliding_attention": rope}
        raw["rope_parameters"] = nested if kind == "lfm3" else rope
    try:
        config = read_config(raw)
    except InputError as error:  # no other exception is allowed
        message = str(error)
    else:
        message = ""
        assert state_specs(config, 1, 2)
        for layer_type in config.rope:
            assert bool(inverse_frequencies(config, layer_type).isfinite().all())
    assert len(message) < 2000  # it fits on a screen


def test_a_number_larger_than_any_float_is_an_input_error() -> None:
    with pytest.raises(InputError, match="out of range") as caught:
        read_config({**KINDS["lfm2"], "block_ff_dim": 10**400})
    assert "a number of 1329 bits" in str(caught.value)
