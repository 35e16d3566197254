"""Parity, rung 1: the float32 decoder against transformers, for all model types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.model import build_decoder
from lfmc.model.attention import CACHE_WRITES
from lfmc.model.decoder import Decoder
from lfmc.model.experts import SparseMoe
from tests.conftest import TRAINED
from tests.factories import (
    KINDS,
    decoder_logits,
    random_tokens,
    reference_logits,
    reference_model,
)

SLIDING = ("lfm3", "lfm3-attention-bias", "lfm3-plain", "lfm3_vl", "lfm3-17m")
BIASED = ("lfm2_moe", "lfm2_moe-scaled", "lfm2-moe-8m", "lfm2-moe-38m")
TOLERANCE = 1e-5  # relative to the largest logit
CHUNKS = {
    "one-shot": [24],
    "prefill-decode": [8, *[1] * 16],
    "chunked": [7, 5, 1, 11],
    "one-token": [1],
}


@pytest.fixture(scope="module", params=[*KINDS, *TRAINED])
def checkpoint(
    request: pytest.FixtureRequest, any_checkpoint: Callable[[str], Checkpoint]
) -> Checkpoint:
    return any_checkpoint(request.param)


@pytest.fixture(scope="module")
def decoder(checkpoint: Checkpoint) -> Decoder:
    return checkpoint.decoder()


def assert_close(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape
    difference = float((logits - expected).abs().max())
    assert difference <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("name", CHUNKS)
def test_logits(checkpoint: Checkpoint, decoder: Decoder, name: str) -> None:
    chunks = CHUNKS[name]
    tokens = random_tokens(checkpoint.config, 1, sum(chunks))
    logits = decoder_logits(decoder, tokens, chunks, context=40)
    assert_close(logits, reference_logits(checkpoint.path, tokens, chunks))


def test_batch_of_two(checkpoint: Checkpoint, decoder: Decoder) -> None:
    tokens = random_tokens(checkpoint.config, 2, 20)
    chunks = [9, 1, 10]
    expected = reference_logits(checkpoint.path, tokens, chunks)
    assert_close(decoder_logits(decoder, tokens, chunks), expected)


def test_second_prompt_after_reset(checkpoint: Checkpoint, decoder: Decoder) -> None:
    first, second = (random_tokens(checkpoint.config, 1, 12, seed) for seed in (1, 2))
    decoder_logits(decoder, first, [12])
    expected = reference_logits(checkpoint.path, second, [12])
    assert_close(decoder_logits(decoder, second, [12]), expected)


@pytest.mark.parametrize("name", SLIDING)
def test_beyond_the_sliding_window(any_checkpoint: Callable[[str], Checkpoint], name: str) -> None:
    checkpoint = any_checkpoint(name)
    window = checkpoint.config.sliding_window
    tokens = random_tokens(checkpoint.config, 1, 2 * window + 5)
    chunks = [window + 3, 1, 1, window]
    expected = reference_logits(checkpoint.path, tokens, chunks)
    assert_close(decoder_logits(checkpoint.decoder(), tokens, chunks), expected)


@pytest.mark.parametrize("cache_write", CACHE_WRITES)
def test_every_cache_write_computes_the_same_logits(
    checkpoint: Checkpoint, decoder: Decoder, cache_write: str
) -> None:
    variant = build_decoder(checkpoint.config, cache_write)
    variant.load_state_dict(decoder.state_dict(), assign=True)
    tokens = random_tokens(checkpoint.config, 1, 14)
    expected = decoder_logits(decoder, tokens, [14], context=20)
    assert_close(decoder_logits(variant, tokens, [6, 1, 7], context=20), expected)


def test_unknown_cache_write(tiny_checkpoint: Callable[[str], Path]) -> None:
    decoder = build_decoder(open_checkpoint(tiny_checkpoint("lfm2")).config, "in_place")
    with pytest.raises(ValueError, match="in_place"):
        decoder_logits(decoder.to_empty(device="cpu"), torch.ones(1, 2, dtype=torch.int64), [2])


# Experts ---------------------------------------------------------------------------------------


def experts_of_decoder(decoder: Decoder, tokens: Tensor) -> list[Tensor]:
    """Return the chosen experts `[N, k]` of each sparse layer, in the order of their weights."""
    expert_ids: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: expert_ids.append(module.route(inputs[0].flatten(0, 1))[0])
        )
        for module in decoder.modules()
        if isinstance(module, SparseMoe)
    ]
    decoder_logits(decoder, tokens, [tokens.shape[1]])
    for hook in hooks:
        hook.remove()
    return expert_ids


def experts_of_reference(path: Path, tokens: Tensor) -> list[Tensor]:
    expert_ids: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: expert_ids.append(output[2]))
        for name, module in reference_model(path).named_modules()
        if name.endswith("feed_forward.gate")
    ]
    reference_logits(path, tokens, [tokens.shape[1]])
    for hook in hooks:
        hook.remove()
    return expert_ids


@pytest.mark.parametrize("name", [*BIASED, "lfm2_moe-no-bias"])
def test_chosen_experts(any_checkpoint: Callable[[str], Checkpoint], name: str) -> None:
    checkpoint = any_checkpoint(name)
    config = checkpoint.config
    tokens = random_tokens(config, 2, 32)
    actual = experts_of_decoder(checkpoint.decoder(), tokens)
    expected = experts_of_reference(checkpoint.path, tokens)
    assert len(actual) == sum(config.is_moe_layer(i) for i in range(config.num_layers)) > 0
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.sort().values, b.sort().values)


@pytest.mark.parametrize("name", BIASED)
def test_the_bias_changes_the_chosen_experts(
    any_checkpoint: Callable[[str], Checkpoint], name: str
) -> None:
    checkpoint = any_checkpoint(name)
    tokens = random_tokens(checkpoint.config, 1, 256)
    zeros = {
        name: torch.zeros(info.shape)
        for name, info in checkpoint.tensors.items()
        if name.endswith("expert_bias")
    }
    expert_ids = experts_of_decoder(checkpoint.decoder(), tokens)
    unbiased = experts_of_decoder(checkpoint.decoder(zeros), tokens)
    # the first layer that differs has the same input: expert weights do not contain the bias
    assert any(
        not torch.equal(a.sort().values, b.sort().values)
        for a, b in zip(expert_ids, unbiased, strict=True)
    )
