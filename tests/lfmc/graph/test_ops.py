"""The `lfm::` operators: equal to the decoder's modules, correctly registered, decomposable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lfmc.graph.ops  # noqa: F401 (registers the operators)
from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.graph.ops import decompositions
from lfmc.model.attention import CACHE_WRITES, attention_mask
from lfmc.model.decoder import Decoder
from lfmc.model.rope import rotation

LFM = torch.ops.lfm
POSITIONS = torch.tensor([2, 3, 4])


@pytest.fixture(scope="module")
def decoders(tiny_checkpoint: Callable[..., Path]) -> dict[str, Decoder]:
    kinds = ("lfm2-conv-bias", "lfm2_moe", "lfm2_moe-scaled", "lfm3")
    return {kind: open_checkpoint(tiny_checkpoint(kind)).decoder() for kind in kinds}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm(decoders: dict[str, Decoder]) -> None:
    norm, x = decoders["lfm3"].model.embedding_norm, random(2, 3, 64)
    assert torch.equal(LFM.rms_norm(x, norm.weight, norm.eps), norm(x))


def test_add_rms_norm(decoders: dict[str, Decoder]) -> None:
    norm, x, residual = decoders["lfm3"].model.embedding_norm, random(2, 3, 64), random(2, 3, 64)
    y, total = LFM.add_rms_norm(x, residual, norm.weight, norm.eps)
    assert torch.equal(total, residual + x)
    assert torch.equal(y, norm(residual + x))


@pytest.mark.parametrize("kind", ["lfm2-conv-bias", "lfm3"])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_gated_short_conv(decoders: dict[str, Decoder], kind: str, length: int) -> None:
    block = decoders[kind].model.layers[0].conv
    taps = block.conv.weight.shape[2]
    x, state = random(2, length, 64), random(2, 64, taps - 1, seed=1)
    y, new_state = LFM.gated_short_conv(block.in_proj(x), block.conv.weight, block.conv.bias, state)
    expected, expected_state = block(x, state)
    torch.testing.assert_close(block.out_proj(y), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(new_state, expected_state)


def attention_inputs(decoder: Decoder, layer: int) -> tuple[Any, ...]:
    block, config = decoder.model.layers[layer].self_attn, decoder.config
    kind, x = config.layer_types[layer], random(2, 3, 64)
    shape = (2, config.num_kv_heads, 12, config.head_dim)
    norms = (getattr(block, block.names.q_norm), getattr(block, block.names.k_norm))
    return (
        *(projection(x) for projection in (block.q_proj, block.k_proj, block.v_proj)),
        *(norm.weight for norm in norms),
        decoder.rope.get_buffer(kind),
        POSITIONS,
        random(*shape, seed=1),
        random(*shape, seed=2),
        config.norm_eps,
        config.window(layer) or 0,
    )


@pytest.mark.parametrize("cache_write", CACHE_WRITES)
@pytest.mark.parametrize(("kind", "layer"), [("lfm2_moe", 1), ("lfm3", 1), ("lfm3", 2)])
def test_attention(decoders: dict[str, Decoder], kind: str, layer: int, cache_write: str) -> None:
    decoder = decoders[kind]
    block, inputs = decoder.model.layers[layer].self_attn, attention_inputs(decoder, layer)
    x, (keys, values) = random(2, 3, 64), inputs[7:9]
    y, *caches = LFM.attention(*inputs, cache_write)
    if decoder.config.attention_gate:
        y = y * torch.sigmoid(block.gate_proj(x)).unsqueeze(-1)
    mask = attention_mask(POSITIONS, 12, decoder.config.window(layer))
    cos_sin = rotation(POSITIONS, inputs[5])
    expected, *expected_caches = block(x, cos_sin, mask, POSITIONS, keys, values)
    out = getattr(block, block.names.out)
    torch.testing.assert_close(out(y.flatten(2)), expected, rtol=1e-5, atol=1e-5)
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, expected_cache, rtol=1e-6, atol=1e-6)


def test_swiglu(decoders: dict[str, Decoder]) -> None:
    mlp, x = decoders["lfm3"].model.layers[0].feed_forward, random(2, 3, 64)
    assert torch.equal(mlp.w2(LFM.swiglu(mlp.w1(x), mlp.w3(x))), mlp(x))


def moe_inputs(decoder: Decoder) -> tuple[Any, ...]:
    block, x = decoder.model.layers[1].feed_forward, random(6, 64)
    scores = torch.sigmoid(x @ block.gate.weight.T)
    weights = ([getattr(e, name).weight for e in block.experts] for name in ("w1", "w3", "w2"))
    moe = block.moe
    return x, scores, scores + block.expert_bias, *weights, moe.top_k, moe.normalize, moe.scale


@pytest.mark.parametrize("kind", ["lfm2_moe", "lfm2_moe-scaled"])
def test_moe(decoders: dict[str, Decoder], kind: str) -> None:
    inputs = moe_inputs(decoders[kind])
    block = decoders[kind].model.layers[1].feed_forward
    expected = block(inputs[0].view(2, 3, 64)).view(6, 64)
    torch.testing.assert_close(LFM.moe(*inputs), expected, rtol=1e-6, atol=1e-6)


def packed(bits: int, symmetric: bool, columns: int, group: int = 32) -> tuple[Any, ...]:
    """Return a random matrix `[5, columns]`, its packed parts, and (bits, group, columns)."""
    number_format = Format(bits, group, symmetric, "float16")
    groups, generator = number_format.groups_per_row(columns), torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (5, groups * group), generator=generator).to(torch.uint8)
    zeros = torch.randint(1 << bits, (5, groups), generator=generator).to(torch.uint8)
    weight = PackedTensor(
        number_format,
        (5, columns),
        codes,
        random(5, groups).half(),
        None if symmetric else zeros,
    )
    parts = (weight.packed_codes(), weight.scales, weight.zeros)
    return weight.dequantize(), parts, (bits, group, columns)


QUANTIZED = [(b, s, c) for b in (1, 2, 3, 4, 5, 8) for s in (True, False) for c in (64, 40)]


@pytest.mark.parametrize(("bits", "symmetric", "columns"), QUANTIZED)
def test_dequantize(bits: int, symmetric: bool, columns: int) -> None:
    expected, parts, shape = packed(bits, symmetric, columns)
    assert torch.equal(LFM.dequantize(*parts, *shape), expected)


@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_linear_nbits(bias: Tensor | None) -> None:
    weight, parts, shape = packed(3, False, 40)
    x = random(2, 40)
    expected = nn.functional.linear(x, weight, bias)
    assert torch.equal(LFM.linear_nbits(x, *parts, bias, *shape), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_embedding_nbits(symmetric: bool) -> None:
    weight, parts, shape = packed(4, symmetric, 40)
    ids = torch.tensor([[4, 0, 4], [1, 2, 3]])
    assert torch.equal(LFM.embedding_nbits(ids, *parts, *shape), weight[ids])


# Registration and decomposition ----------------------------------------------------------------


def examples(decoders: dict[str, Decoder]) -> dict[str, tuple[Any, ...]]:
    conv = decoders["lfm2-conv-bias"].model.layers[0].conv.conv
    _, parts, shape = packed(4, False, 40)
    _, symmetric, _ = packed(4, True, 40)
    return {
        "rms_norm": (random(2, 3, 8), random(8), 1e-5),
        "add_rms_norm": (random(2, 3, 8), random(2, 3, 8), random(8), 1e-5),
        "gated_short_conv": (random(2, 3, 192), conv.weight, conv.bias, random(2, 64, 2)),
        "attention": (*attention_inputs(decoders["lfm3"], 1), "scatter"),
        "swiglu": (random(2, 3), random(2, 3)),
        "moe": moe_inputs(decoders["lfm2_moe"]),
        "dequantize": (*symmetric, *shape),
        "linear_nbits": (random(2, 40), *parts, random(5), *shape),
        "embedding_nbits": (torch.tensor([[4, 0, 4]]), *parts, *shape),
    }


NAMES = [str(op).split(".")[1] for op in decompositions()]


def test_every_operator_has_an_example(decoders: dict[str, Decoder]) -> None:
    assert sorted(examples(decoders)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_registration_is_correct(decoders: dict[str, Decoder], name: str) -> None:
    # checks schema and fake tensors; the operators have no gradients
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(getattr(LFM, name).default, examples(decoders)[name], test_utils=checks)


class Call(nn.Module):
    def __init__(self, name: str, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.name, self.inputs = name, inputs

    def forward(self, *tensors: Tensor) -> Any:
        remaining = iter(tensors)
        inputs = [next(remaining) if isinstance(v, Tensor) else v for v in self.inputs]
        return getattr(LFM, self.name)(*inputs)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_decomposes_every_operator(decoders: dict[str, Decoder], name: str) -> None:
    inputs = examples(decoders)[name]
    tensors = tuple(v for v in inputs if isinstance(v, Tensor))
    call = Call(name, inputs)
    exported = torch.export.export(call, tensors)
    assert f"torch.ops.lfm.{name}" in exported.graph_module.code
    unchanged = exported.run_decompositions(decompositions(name))
    assert f"torch.ops.lfm.{name}" in unchanged.graph_module.code
    decomposed = exported.run_decompositions(decompositions())
    assert "torch.ops.lfm" not in decomposed.graph_module.code
    torch.testing.assert_close(decomposed.module()(*tensors), call(*tensors), rtol=1e-6, atol=1e-6)
