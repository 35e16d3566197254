"""Reads the configuration of a decoder from `config.json` and checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfmc.errors import InputError
from lfmc.model.config import CONV, FULL, SLIDING, DecoderConfig, Moe, Rope

LAYER_TYPES: Mapping[str, frozenset[str]] = {
    "lfm2": frozenset({CONV, FULL}),
    "lfm2_moe": frozenset({CONV, FULL}),
    "lfm3": frozenset({CONV, FULL, SLIDING}),
}
# A vision-language checkpoint has a text model of one of these types under `text_config`.
VISION_TYPES: frozenset[str] = frozenset({"lfm2_vl", "lfm3_vl"})

_MAX_SIZE = 1 << 24  # far beyond every model, and products stay below 2^63
_MAX_COUNT = 4096  # of layers, and of experts in a layer


class _Section:
    """A section of `config.json`; its methods raise `InputError` with the file and the key."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self.raw.get(key, default)
        if value is ... or (value is None and default is not None):
            raise InputError(
                f"config.json has no '{key}'", where=self.where, expected=kind.__name__
            )
        if value is not None and (
            not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
        ):
            raise InputError(
                f"config.json: '{key}' has the wrong type",
                where=self.where,
                expected=kind.__name__,
                got=repr(value),
            )
        return value

    def positive(self, key: str, default: Any = ..., maximum: int = _MAX_SIZE) -> int:
        value: int = self.get(key, int, default)
        if not 0 < value <= maximum:
            raise InputError(
                f"config.json: '{key}' is out of range",
                where=self.where,
                expected=f"1 to {maximum}",
                got=value if abs(value) <= _MAX_SIZE else f"a number of {value.bit_length()} bits",
            )
        return value

    def number(self, key: str, default: float, minimum: float = 0.0) -> float:
        """Return an int or a finite float, at least `minimum`, as a float."""
        value = self.raw.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not minimum <= value <= 1e30:
            raise InputError(
                f"config.json: '{key}' is not a usable number",
                where=self.where,
                expected=f"a number of {minimum:g} or more",
                got=repr(value)[:80],
            )
        return float(value)

    def token_ids(self, key: str, default: int) -> tuple[int, ...]:
        """Return one token id or a list of token ids as a tuple; null is ()."""
        return read_token_ids(self.raw.get(key, default), key, self.where)

    def token_id(self, key: str, default: int) -> int | None:
        ids = self.token_ids(key, default)
        return ids[0] if ids else None


def read_token_ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    """Return token ids from a JSON value: one id, a list of ids, or null. Raise `InputError`."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= _MAX_SIZE for i in ids):
        raise InputError(
            f"'{key}' does not contain token ids",
            where=where,
            expected="a number, a list of numbers, or null",
            got=repr(value)[:80],
        )
    return tuple(ids)


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
    section = _Section(raw, where)
    hidden = section.positive("hidden_size")
    heads = section.positive("num_attention_heads")
    lfm3 = model_type == "lfm3"
    layer_types = _layer_types(section, model_type)
    head_dim = 128 if lfm3 else hidden // heads
    bos, eos, pad = (124_894, 124_900, 124_893) if lfm3 else (1, 2, 0)
    tied = _Section(outer, where)  # in a vision-language model, the outer setting applies
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
        rope=_ropes(section, layer_types, lfm3),
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


def _layer_types(section: _Section, model_type: str) -> tuple[str, ...]:
    count = section.positive("num_hidden_layers", maximum=_MAX_COUNT)
    types = section.raw.get("layer_types")
    full = section.raw.get("full_attn_idxs")
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


def _ffn_size(section: _Section, model_type: str) -> int:
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


def _moe(section: _Section) -> Moe:
    return Moe(
        num_experts=section.positive("num_experts", 32, _MAX_COUNT),
        top_k=section.positive("num_experts_per_tok", 4),
        ffn_size=section.positive("moe_intermediate_size", 1792),
        num_dense_layers=section.get("num_dense_layers", int, 2),
        normalize=section.get("norm_topk_prob", bool, True),
        use_bias=section.get("use_expert_bias", bool, True),
        scale=section.number("routed_scaling_factor", 1.0),
    )


def _ropes(section: _Section, layer_types: tuple[str, ...], lfm3: bool) -> dict[str, Rope]:
    defaults: dict[str, dict[str, Any]] = {
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }
    parameters = section.raw.get("rope_scaling") or section.raw.get("rope_parameters") or {}
    if lfm3:
        parameters = parameters or defaults
    elif isinstance(parameters, dict):
        parameters = dict.fromkeys((FULL, SLIDING), parameters)
    ropes = {}
    for kind in sorted(set(layer_types) - {CONV}):
        rope = parameters.get(kind) if isinstance(parameters, dict) else None
        if not isinstance(rope, dict):
            raise InputError(f"config.json: 'rope_parameters' has no '{kind}'", where=section.where)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "proportional") or rope.get("factor", 1.0) != 1.0:
            raise InputError(
                f"config.json: the rotary embedding of '{kind}' layers is not supported",
                where=section.where,
                expected="rope_type 'default' or 'proportional', factor 1",
                got=str(rope)[:200],
            )
        rope_section = _Section({**_outer_rope(section), **rope}, section.where)
        partial = 1.0
        if rope_type == "proportional":
            partial = rope_section.number("partial_rotary_factor", 1.0)
        theta = rope_section.number("rope_theta", 1e6, minimum=1.0)
        ropes[kind] = Rope(theta=theta, partial=partial)
    return ropes


def _outer_rope(section: _Section) -> dict[str, Any]:
    """Return settings that older files store next to `rope_parameters`, used as its defaults."""
    keys = ("rope_theta", "partial_rotary_factor")
    return {key: section.raw[key] for key in keys if section.raw.get(key) is not None}


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
        if not 0 < width <= _MAX_SIZE:
            raise InputError(f"config.json: {name} is out of range", where=where, got=width)
    if any(rope.partial > 1 for rope in config.rope.values()):
        raise InputError("config.json: 'partial_rotary_factor' is above 1", where=where)
    if config.conv_kernel < 2 and CONV in config.layer_types:
        raise InputError("config.json: 'conv_L_cache' must be at least 2", where=where)
    moe = config.moe
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
