"""Names and shapes of the tensors of a checkpoint, from its configuration alone.

The names are those of `build_decoder(config).state_dict()`, in the same order, but torch is not
needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from lfmc.model.config import CONV, DecoderConfig

Shape = tuple[int, ...]


def tensor_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Return the shape of every tensor by name, in the order of the decoder.

    The decoder's constants (`rope.*`), which no checkpoint contains, are left out.
    """
    return dict(_decoder(config))


def _decoder(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        for name, shape in _layer(config, index):
            yield f"model.layers.{index}.{name}", shape
    yield "model.embedding_norm.weight", (config.hidden_size,)
    if not config.tied_embedding:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def _layer(config: DecoderConfig, index: int) -> Iterator[tuple[str, Shape]]:
    if config.layer_types[index] == CONV:
        yield from _short_conv(config)
    else:
        yield from _attention(config)
    if config.is_moe_layer(index):
        yield from _experts(config)
    else:
        yield from _mlp("feed_forward", config.hidden_size, config.ffn_size)
    norms = ["operator_norm", "ffn_norm"]
    if config.sandwich_norm:
        norms += ["post_operator_norm", "post_ffn_norm"]
    for norm in norms:
        yield f"{norm}.weight", (config.hidden_size,)


def _short_conv(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    size, bias = config.hidden_size, config.conv_bias
    yield "conv.conv.weight", (size, 1, config.conv_kernel)  # depthwise: one input per channel
    if bias:
        yield "conv.conv.bias", (size,)
    yield from _linear("conv.in_proj", size, 3 * size, bias)
    yield from _linear("conv.out_proj", size, size, bias)


def _attention(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    size, bias, names = config.hidden_size, config.attention_bias, config.attention_names
    inner, kv_inner = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    yield from _linear("self_attn.q_proj", size, inner, bias)
    yield from _linear("self_attn.k_proj", size, kv_inner, bias)
    yield from _linear("self_attn.v_proj", size, kv_inner, bias)
    yield from _linear(f"self_attn.{names.out}", inner, size, bias)
    yield f"self_attn.{names.q_norm}.weight", (config.head_dim,)
    yield f"self_attn.{names.k_norm}.weight", (config.head_dim,)
    if config.attention_gate:
        yield from _linear("self_attn.gate_proj", size, config.num_heads, False)


def _experts(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    moe = config.moe
    assert moe is not None  # `is_moe_layer` is true for this layer
    if moe.use_bias:
        yield "feed_forward.expert_bias", (moe.num_experts,)
    yield "feed_forward.gate.weight", (moe.num_experts, config.hidden_size)
    for expert in range(moe.num_experts):
        yield from _mlp(f"feed_forward.experts.{expert}", config.hidden_size, moe.ffn_size)


def _mlp(name: str, size: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.w1.weight", (inner, size)
    yield f"{name}.w3.weight", (inner, size)
    yield f"{name}.w2.weight", (size, inner)


def _linear(name: str, size: int, outputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, size)
    if bias:
        yield f"{name}.bias", (outputs,)
