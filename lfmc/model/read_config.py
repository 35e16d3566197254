"""Reads the configuration of a decoder from `config.json` and checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfmc.errors import InputError
from lfmc.model.config import CONV, FULL, SLIDING, DecoderConfig, Moe
from lfmc.model.config_section import MAX_SIZE, Section
from lfmc.model.read_rope import read_ropes

LAYER_TYPES: Mapping[str, frozenset[str]] = {
    "lfm2": frozenset({CONV, FULL}),
    "lfm2_moe": frozenset({CONV, FULL}),
    "lfm3": frozenset({CONV, FULL, SLIDING}),
}
# A vision-language checkpoint has a text model of one of these types under `text_config`.
VISION_TYPES: frozenset[str] = frozenset({"lfm2_vl", "lfm3_vl"})

# The classes that predict the next token, and their backbones.
_CAUSAL: Mapping[str, tuple[str, str]] = {
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Model"),
    "lfm2_moe": ("Lfm2MoeForCausalLM", "Lfm2MoeModel"),
    "lfm3": ("Lfm3ForCausalLM", "Lfm3Model"),
    "lfm2_vl": ("Lfm2VlForConditionalGeneration", "Lfm2VlModel"),
    "lfm3_vl": ("Lfm3VlForConditionalGeneration", "Lfm3VlModel"),
}
_MAX_COUNT = 4096  # of layers, and of experts in a layer


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Read a Hugging Face `config.json` (already parsed) into a `DecoderConfig`.

    For `lfm2_vl` and `lfm3_vl`, read the configuration of the language tower. `where` is the path
    of the file, for error messages. Defaults are those of `Lfm2Config`, `Lfm2MoeConfig` and
    `Lfm3Config` in transformers 5.23. Raise `InputError` for an unknown model type or a bad value.
    """
    outer = raw
    if str(raw.get("model_type")) in VISION_TYPES:
        raw = outer.get("text_config", {})
        if not isinstance(raw, dict) or not raw:
            raise InputError("config.json has no 'text_config'", where=where, expected="an object")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in LAYER_TYPES:
        raise InputError(
            "this model type is not supported",
            where=where,
            expected=", ".join([*LAYER_TYPES, *sorted(VISION_TYPES)]),
            got=repr(model_type)[:80],
        )
    _require_causal(outer, where)
    section = Section(raw, where)
    hidden = section.positive("hidden_size")
    heads = section.positive("num_attention_heads")
    lfm3 = model_type == "lfm3"
    layer_types = _layer_types(section, model_type)
    head_dim = 128 if lfm3 else hidden // heads
    bos, eos, pad = (124_894, 124_900, 124_893) if lfm3 else (1, 2, 0)
    tied = Section(outer, where)  # in a vision-language model, the outer setting applies
    config = DecoderConfig(
        model_type=model_type,
        vocab_size=section.positive("vocab_size"),
        hidden_size=hidden,
        ffn_size=_ffn_size(section, model_type),
        layer_types=layer_types,
        num_heads=heads,
        num_kv_heads=section.positive("num_key_value_heads"),
        head_dim=head_dim if raw.get("head_dim") is None else section.positive("head_dim"),
        conv_kernel=section.positive("conv_L_cache", 7 if lfm3 else 3),
        conv_bias=section.get("conv_bias", bool, False),
        attention_bias=lfm3 and section.get("attention_bias", bool, False),
        norm_eps=section.number("norm_eps", 1e-5),
        rope=read_ropes(section, layer_types, lfm3),
        sliding_window=section.positive("sliding_window", 256) if SLIDING in layer_types else 0,
        sandwich_norm=lfm3 and section.get("use_sandwich_norm", bool, True),
        attention_gate=lfm3 and section.get("use_attention_gate", bool, True),
        tied_embedding=tied.get("tie_embedding", bool, tied.get("tie_word_embeddings", bool, True)),
        max_context=section.positive("max_position_embeddings", 128_000),
        bos_id=section.token_id("bos_token_id", bos),
        eos_ids=section.token_ids("eos_token_id", eos),
        pad_id=section.token_id("pad_token_id", pad),
        moe=_moe(section) if model_type == "lfm2_moe" else None,
    )
    _check(config, where)
    return config


def _require_causal(raw: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` if the checkpoint's class is not a causal language model."""
    supported = _CAUSAL[str(raw["model_type"])]
    classes = raw.get("architectures") or []
    if isinstance(classes, list) and all(name in supported for name in classes):
        return
    raise InputError(
        "the checkpoint is not a causal language model",
        where=where,
        expected=f"'architectures' with {' or '.join(supported)}",
        got=", ".join(map(str, classes))[:80] if isinstance(classes, list) else repr(classes)[:80],
        todo="lfmc exports models that predict the next token: no encoders, embedders, classifiers",
    )


def _layer_types(section: Section, model_type: str) -> tuple[str, ...]:
    count = section.positive("num_hidden_layers", maximum=_MAX_COUNT)
    types = section.raw.get("layer_types")
    full = section.raw.get("full_attn_idxs")
    if types is None and model_type == "lfm2":
        full = list(range(count)) if full is None else full  # all attention, as in transformers
    if types is None and isinstance(full, list):
        types = [FULL if i in full else CONV for i in range(count)]
    if types is None and model_type == "lfm3":
        types = [
            FULL if i % 4 == 2 else SLIDING if i % 4 == 0 and i > 0 else CONV for i in range(count)
        ]
    if not isinstance(types, list) or len(types) != count:
        raise InputError(
            "config.json: 'layer_types' does not list one type per layer",
            where=section.where,
            expected=f"{count} entries",
            got=len(types) if isinstance(types, list) else repr(types)[:80],
        )
    supported = LAYER_TYPES[model_type]
    unknown = [kind for kind in types if not isinstance(kind, str) or kind not in supported]
    if unknown:
        raise InputError(
            f"config.json: '{model_type}' has layers of an unknown type",
            where=section.where,
            expected=", ".join(sorted(supported)),
            got=", ".join(dict.fromkeys(map(repr, unknown)))[:80],
        )
    return tuple(types)


def _ffn_size(section: Section, model_type: str) -> int:
    """Return the width of the dense feed-forward; `lfm2` rounds it like transformers' `Lfm2MLP`."""
    size = section.positive("intermediate_size", section.raw.get("block_ff_dim", ...))
    if model_type != "lfm2":
        return size
    size = section.positive("block_ff_dim", size)
    if not section.get("block_auto_adjust_ff_dim", bool, True):
        return size
    size = int(2 * size / 3)
    if section.raw.get("block_ffn_dim_multiplier", 1.0) is not None:
        multiple = section.positive("block_multiple_of", 256)
        size = int(section.number("block_ffn_dim_multiplier", 1.0) * size)
        size = multiple * -(-size // multiple)
    return size


def _moe(section: Section) -> Moe:
    return Moe(
        num_experts=section.positive("num_experts", 32, _MAX_COUNT),
        top_k=section.positive("num_experts_per_tok", 4),
        ffn_size=section.positive("moe_intermediate_size", 1792),
        num_dense_layers=section.get("num_dense_layers", int, 2),
        normalize=section.get("norm_topk_prob", bool, True),
        use_bias=section.get("use_expert_bias", bool, True),
        scale=section.number("routed_scaling_factor", 1.0),
    )


def _check(config: DecoderConfig, where: str) -> None:
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            "config.json: attention heads do not divide into key/value heads",
            where=where,
            got=f"{config.num_heads} heads, {config.num_kv_heads} key/value heads",
        )
    if config.head_dim % 2 or not config.head_dim:
        raise InputError("config.json: 'head_dim' must be even", where=where, got=config.head_dim)
    widths = {
        "the feed-forward size": config.ffn_size,
        "num_attention_heads * head_dim": config.num_heads * config.head_dim,
    }
    for name, width in widths.items():
        if not 0 < width <= MAX_SIZE:
            raise InputError(f"config.json: {name} is out of range", where=where, got=width)
    if any(rope.partial > 1 for rope in config.rope.values()):
        raise InputError("config.json: 'partial_rotary_factor' is above 1", where=where)
    if config.conv_kernel < 2 and CONV in config.layer_types:
        raise InputError("config.json: 'conv_L_cache' must be at least 2", where=where)
    if not config.rope:
        raise InputError(
            "config.json: the model has no attention layer",
            where=where,
            expected="at least one: transformers can't run such a model with a cache, either",
        )
    moe = config.moe
    if moe and moe.num_experts == 1:
        raise InputError(
            "config.json: the sparse layers have one expert",
            where=where,
            expected="num_experts of 2 or more",
            todo="save the expert as a dense feed-forward, or set num_dense_layers",
        )
    if moe and moe.top_k > moe.num_experts:
        raise InputError(
            "config.json: more experts per token than experts",
            where=where,
            got=f"{moe.top_k} of {moe.num_experts}",
        )
    if moe and not 0 <= moe.num_dense_layers <= config.num_layers:
        raise InputError(
            "config.json: 'num_dense_layers' is outside the model",
            where=where,
            got=f"{moe.num_dense_layers} of {config.num_layers} layers",
        )
