"""The configuration of an LFM decoder, the same class for every model type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONV = "conv"
FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023): dims that turn slowly within the trained context are interpolated.

    Dims with more than `beta_fast` turns in `context` positions stay, dims with fewer than
    `beta_slow` turns are slowed down by `factor`. `gain` multiplies queries and keys.
    """

    factor: float
    context: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    gain: float


@dataclass(frozen=True)
class Llama3:
    """Scaling of Llama 3.1: dims with long wavelengths are slowed down by `factor`."""

    factor: float
    context: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one attention layer type.

    `partial` is the fraction of rotated dims. Frequencies are divided by `factor`, then `scaling`
    changes some of them.
    """

    theta: float
    partial: float = 1.0
    factor: float = 1.0
    scaling: Yarn | Llama3 | None = None

    @property
    def gain(self) -> float:
        """The factor of rotated queries and keys."""
        return self.scaling.gain if isinstance(self.scaling, Yarn) else 1.0


@dataclass(frozen=True)
class Moe:
    """Sparse experts: the `top_k` of `num_experts` with the largest `sigmoid(router) + bias`."""

    num_experts: int
    top_k: int
    ffn_size: int
    num_dense_layers: int
    normalize: bool
    use_bias: bool
    scale: float


@dataclass(frozen=True)
class AttentionNames:
    """Names on disk of the modules of an attention block; they differ between generations."""

    q_norm: str
    k_norm: str
    out: str


@dataclass(frozen=True)
class DecoderConfig:
    """All settings that determine the shapes and the arithmetic of a decoder."""

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

    @property
    def total_num_experts(self) -> int:
        """Number of experts, summed over all sparse layers."""
        if self.moe is None:
            return 0
        return self.moe.num_experts * (self.num_layers - self.moe.num_dense_layers)

    def window(self, layer: int) -> int | None:
        """Return how many positions a layer attends to, including the current one; None for all."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None
