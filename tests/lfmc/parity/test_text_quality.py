"""Quality on text: KL divergence, agreement, perplexity, and windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.errors import InputError
from lfmc.parity.text_quality import QualityMeter, compare, logits_of, windows


def test_numbers_equal_a_calculation_by_hand() -> None:
    reference = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, math.log(3.0)]]])
    quality = compare(reference, logits, torch.tensor([[0, 1]]))
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert quality.kl == pytest.approx((first + second) / 2)
    assert quality.top1 == 0.5
    assert quality.perplexity == pytest.approx(4.0)
    assert quality.reference_perplexity == pytest.approx(2.0)
    assert quality.tokens == 2


def test_a_model_equals_itself() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    quality = compare(logits, logits, torch.randint(0, 11, (2, 5)))
    assert (quality.kl, quality.top1) == (0.0, 1.0)
    assert quality.perplexity == quality.reference_perplexity


def test_batches_sum_to_one_result() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, logits = torch.randn(2, 4, 6, 9, generator=generator)
    tokens = torch.randint(0, 9, (4, 6), generator=generator)
    meter = QualityMeter()
    for i in range(4):
        meter.add(reference[i : i + 1], logits[i : i + 1], tokens[i : i + 1])
    expected, quality = compare(reference, logits, tokens), meter.result()
    assert quality.kl == pytest.approx(expected.kl, rel=1e-12)
    assert quality.perplexity == pytest.approx(expected.perplexity, rel=1e-12)
    assert (quality.top1, quality.tokens) == (expected.top1, expected.tokens)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        compare(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="no tokens"):
        QualityMeter().result()


def test_windows_are_spread_over_the_text() -> None:
    tokenizer = open_checkpoint().tokenizer()
    text = "The quick brown fox jumps over the lazy dog. " * 40
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = windows(tokenizer, text, 16, 3, 1)
    assert pieces.shape == (3, 16)
    assert (pieces[:, 0] == 1).all()
    assert pieces[0, 1:].tolist() == ids[1:16]
    assert pieces[-1, 1:].tolist() == ids[-15:]
    assert windows(tokenizer, text, 16, 1, None)[0].tolist() == ids[:16]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="too short"):
        windows(open_checkpoint().tokenizer(), "Hello.", 16, 3, 1)


def test_logits_do_not_depend_on_the_batch(tiny_checkpoint: Callable[..., Path]) -> None:
    decoder = open_checkpoint(tiny_checkpoint("lfm2", vocab_size=64)).decoder()
    tokens = torch.randint(64, (5, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        small_batches = torch.cat(list(logits_of(decoder, tokens, batch=2)))
        one_batch = torch.cat(list(logits_of(decoder, tokens, batch=8)))
    assert one_batch.shape == (5, 9, 64)
    torch.testing.assert_close(small_batches, one_batch)
