"""One configuration for every LFM decoder, read from a checkpoint's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfmc.errors import InputError

CONV = "conv"
FULL = "full_attention"
SLIDING = "sliding_attention"

LAYER_TYPES: Mapping[str, frozenset[str]] = {
    "lfm2": frozenset({CONV, FULL}),
    "lfm2_moe": frozenset({CONV, FULL}),
    "lfm3": frozenset({CONV, FULL, SLIDING}),
}
# A vision-language checkpoint holds a text model of one of the types above under `text_config`.
VISION_TYPES: frozenset[str] = frozenset({"lfm2_vl", "lfm3_vl"})


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of attention layer; `partial` is the share of dims that turn."""

    theta: float
    partial: float = 1.0


@dataclass(frozen=True)
class Moe:
    """Sparse experts: top `top_k` of `num_experts` by `sigmoid(router) + bias`."""

    num_experts: int
    top_k: int
    ffn_size: int
    num_dense_layers: int
    normalize: bool
    use_bias: bool
    scale: float


@dataclass(frozen=True)
class AttentionNames:
    """Names on disk of the parts of an attention block, which differ between generations."""

    q_norm: str
    k_norm: str
    out: str


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the shape and the arithmetic of a decoder."""

    model_type: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layer_types: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    conv_kernel: int
    conv_bias: bool
    attention_bias: bool
    norm_eps: float
    rope: Mapping[str, Rope]
    sliding_window: int
    sandwich_norm: bool
    attention_gate: bool
    tied_embedding: bool
    max_context: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    moe: Moe | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def attention_names(self) -> AttentionNames:
        if self.model_type == "lfm3":
            return AttentionNames("q_norm", "k_norm", "o_proj")
        return AttentionNames("q_layernorm", "k_layernorm", "out_proj")

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.num_dense_layers

    def window(self, layer: int) -> int | None:
        """Number of positions (the current one included) that a layer sees; None means all."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None


class _Reader:
    """A `config.json` section that names its file and key when something is wrong with it."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self.raw.get(key, default)
        if value is ... or (value is None and default is not None):
            raise InputError(f"config.json has no '{key}'", where=self.where, expected=kind.__name__)
        good = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if value is not None and (not good or (kind is not bool and isinstance(value, bool))):
            raise InputError(
                f"config.json: '{key}' has the wrong type",
                where=self.where,
                expected=kind.__name__,
                got=repr(value),
            )
        return value

    def positive(self, key: str, default: Any = ...) -> int:
        value: int = self.get(key, int, default)
        if value <= 0:
            raise InputError(
                f"config.json: '{key}' must be positive", where=self.where, got=value
            )
        return value


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Read a Hugging Face `config.json` (already parsed) into a `DecoderConfig`.

    `lfm2_vl` and `lfm3_vl` give the configuration of their language tower. `where` is the file's
    path, for messages. Raises `InputError` for an unknown model type or a bad value. Defaults are
    those of `Lfm2Config`, `Lfm2MoeConfig` and `Lfm3Config` in transformers 5.23.
    """
    outer = raw
    if raw.get("model_type") in VISION_TYPES:
        inner = raw.get("text_config")
        if not isinstance(inner, dict):
            raise InputError("config.json has no 'text_config'", where=where, expected="an object")
        raw = {"tie_word_embeddings": outer.get("tie_word_embeddings", True), **inner}
    model_type = raw.get("model_type")
    if model_type not in LAYER_TYPES:
        raise InputError(
            "this model type is not an LFM that lfmc knows",
            where=where,
            expected=", ".join([*LAYER_TYPES, *sorted(VISION_TYPES)]),
            got=repr(model_type),
        )
    read = _Reader(raw, where)
    hidden = read.positive("hidden_size")
    heads = read.positive("num_attention_heads")
    lfm3 = model_type == "lfm3"
    layer_types = _layer_types(read, model_type)
    eos = raw.get("eos_token_id")
    config = DecoderConfig(
        model_type=model_type,
        vocab_size=read.positive("vocab_size"),
        hidden_size=hidden,
        ffn_size=_ffn_size(read, model_type),
        layer_types=layer_types,
        num_heads=heads,
        num_kv_heads=read.positive("num_key_value_heads"),
        head_dim=raw.get("head_dim") or (128 if lfm3 else hidden // heads),
        conv_kernel=read.positive("conv_L_cache", 7 if lfm3 else 3),
        conv_bias=read.get("conv_bias", bool, False),
        attention_bias=lfm3 and read.get("attention_bias", bool, False),
        norm_eps=float(read.get("norm_eps", float, 1e-5)),
        rope=_ropes(read, layer_types, lfm3),
        sliding_window=read.positive("sliding_window", 256) if SLIDING in layer_types else 0,
        sandwich_norm=lfm3 and read.get("use_sandwich_norm", bool, True),
        attention_gate=lfm3 and read.get("use_attention_gate", bool, True),
        tied_embedding=bool(raw.get("tie_embedding", raw.get("tie_word_embeddings", True))),
        max_context=read.positive("max_position_embeddings", 128_000),
        bos_id=raw.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_id=raw.get("pad_token_id"),
        moe=_moe(read) if model_type == "lfm2_moe" else None,
    )
    _check(config, where)
    return config


def _layer_types(read: _Reader, model_type: str) -> tuple[str, ...]:
    count = read.positive("num_hidden_layers")
    types = read.raw.get("layer_types")
    if types is None and read.raw.get("full_attn_idxs") is not None:
        full = set(read.raw["full_attn_idxs"])
        types = [FULL if i in full else CONV for i in range(count)]
    if types is None and model_type == "lfm3":
        types = [
            FULL if i % 4 == 2 else SLIDING if i % 4 == 0 and i > 0 else CONV for i in range(count)
        ]
    if not isinstance(types, list) or len(types) != count:
        raise InputError(
            "config.json: 'layer_types' does not list one type a layer",
            where=read.where,
            expected=f"{count} entries",
            got="none" if types is None else f"{len(types)}",
        )
    unknown = sorted(set(types) - LAYER_TYPES[model_type])
    if unknown:
        raise InputError(
            f"config.json: '{model_type}' has layers of an unknown type",
            where=read.where,
            expected=", ".join(sorted(LAYER_TYPES[model_type])),
            got=", ".join(map(str, unknown)),
        )
    return tuple(types)


def _ffn_size(read: _Reader, model_type: str) -> int:
    """Width of the dense feed-forward; `lfm2` rounds it as `Lfm2MLP` in transformers does."""
    size = read.positive("intermediate_size", read.raw.get("block_ff_dim", ...))
    if model_type != "lfm2":
        return size
    size = read.positive("block_ff_dim", size)
    if not read.get("block_auto_adjust_ff_dim", bool, True):
        return size
    size = int(2 * size / 3)
    multiplier = read.raw.get("block_ffn_dim_multiplier", 1.0)
    if multiplier is not None:
        multiple = read.positive("block_multiple_of", 256)
        size = multiple * -(-int(multiplier * size) // multiple)
    return size


def _moe(read: _Reader) -> Moe:
    return Moe(
        num_experts=read.positive("num_experts", 32),
        top_k=read.positive("num_experts_per_tok", 4),
        ffn_size=read.positive("moe_intermediate_size", 1792),
        num_dense_layers=read.get("num_dense_layers", int, 2),
        normalize=read.get("norm_topk_prob", bool, True),
        use_bias=read.get("use_expert_bias", bool, True),
        scale=float(read.get("routed_scaling_factor", float, 1.0)),
    )


def _ropes(read: _Reader, layer_types: tuple[str, ...], lfm3: bool) -> dict[str, Rope]:
    defaults: dict[str, dict[str, Any]] = {
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }
    given = read.raw.get("rope_parameters") or read.raw.get("rope_scaling")
    ropes = {}
    for kind in sorted(set(layer_types) - {CONV}):
        if lfm3:
            params = (given or defaults).get(kind)
        else:
            params = given or {"rope_theta": read.raw.get("rope_theta", 1e6)}
        if not isinstance(params, dict):
            raise InputError(f"config.json: 'rope_parameters' has no '{kind}'", where=read.where)
        rope_type = params.get("rope_type", params.get("type", "default"))
        if rope_type not in ("default", "proportional") or params.get("factor", 1.0) != 1.0:
            raise InputError(
                f"config.json: the rotary embedding of '{kind}' layers is not known",
                where=read.where,
                expected="rope_type 'default' or 'proportional', factor 1",
                got=params,
            )
        partial = params.get("partial_rotary_factor", 1.0) if rope_type == "proportional" else 1.0
        ropes[kind] = Rope(theta=float(params.get("rope_theta", 1e6)), partial=float(partial))
    return ropes


def _check(config: DecoderConfig, where: str) -> None:
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            "config.json: attention heads do not divide into key/value heads",
            where=where,
            got=f"{config.num_heads} heads, {config.num_kv_heads} key/value heads",
        )
    if config.head_dim % 2:
        raise InputError("config.json: 'head_dim' must be even", where=where, got=config.head_dim)
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
