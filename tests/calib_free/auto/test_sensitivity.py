from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.calib_free.auto import sampled_text, sensitivity
from lfmc.calib_free.auto import streamed_decoder as streamed
from lfmc.calib_free.auto.sampled_text import (
    sample_texts,
    sample_texts_with_states,
    sample_tokens,
)
from lfmc.calib_free.auto.sensitivity import (
    Sensitivity,
    column_importance,
    compute_sensitivities,
    sample_rows,
)
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.model import initial_state
from lfmc.parity.text_quality import logits_of
from tests.calib_free.conftest import MakeCheckpoint


def _silent(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "matmul_dtype", lambda device: torch.float32)


def sensitivities_of(
    stream: StreamedDecoder, tokens: Tensor, seed: int, **options: Any
) -> list[Sensitivity]:
    """Return the sensitivities of all layers."""
    layers = compute_sensitivities(stream, tokens, seed, _silent, **options)
    return list(chain.from_iterable(layers))


def labels_of(checkpoint: Checkpoint, tokens: Tensor, seed: int) -> Tensor:
    """Return the labels that `compute_sensitivities` samples, from the whole model's logits."""
    logits = torch.cat(list(logits_of(checkpoint.decoder(), tokens)))
    generator = torch.Generator().manual_seed(seed)
    return sample_tokens(logits.flatten(0, 1), generator).view_as(tokens)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe", "lfm3"])
def test_sensitivity_is_the_squared_gradient_of_each_text(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, model_type: str, tied: bool
) -> None:
    monkeypatch.setattr(sensitivity, "ROWS", 1000)  # all rows
    checkpoint = make_checkpoint(model_type, tie_word_embeddings=tied)
    tokens = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
    sensitivity_of = {s.name: s for s in sensitivities_of(StreamedDecoder(checkpoint), tokens, 5)}
    decoder, labels = checkpoint.decoder(), labels_of(checkpoint, tokens, 5)
    expected = {name: torch.zeros(checkpoint.tensors[name].shape) for name in sensitivity_of}
    for text, targets in zip(tokens, labels, strict=True):
        decoder.requires_grad_(True).zero_grad()
        logits, _ = decoder(text[None], torch.arange(9), initial_state(checkpoint.config, 1, 9))
        torch.autograd.backward(F.cross_entropy(logits[0], targets, reduction="sum"))
        for name, total in expected.items():
            gradient = decoder.get_parameter(name).grad
            if gradient is not None:  # None: no token chose this expert
                total += gradient.square() / tokens.numel()
    for name, fisher in expected.items():
        torch.testing.assert_close(
            sensitivity_of[name].columns, fisher.sum(0), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(sensitivity_of[name].information, fisher, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["model.layers.0.conv.out_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
)
def test_it_predicts_the_kl_of_random_errors(make_checkpoint: MakeCheckpoint, name: str) -> None:
    checkpoint = make_checkpoint("lfm2")
    stream, decoder = StreamedDecoder(checkpoint), checkpoint.decoder()
    tokens = sample_texts(stream, 64, 16, 0, _silent)
    matrix = {s.name: s for s in sensitivities_of(stream, tokens, 0)}[name]
    weight = decoder.get_parameter(name)
    noise = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        p = torch.cat(list(logits_of(decoder, tokens))).double().log_softmax(-1)
        weight.add_(noise)
        q = torch.cat(list(logits_of(decoder, tokens))).double().log_softmax(-1)
    actual = float((p.exp() * (p - q)).sum(-1).mean())
    predicted = 0.5 * float((matrix.information * noise[matrix.rows].square()).sum())
    assert predicted == pytest.approx(actual, rel=0.35)


def test_sampled_rows_represent_all_rows(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StreamedDecoder(make_checkpoint("lfm2"))
    tokens = sample_texts(stream, 8, 16, 0, _silent)
    all_rows = {s.name: s for s in sensitivities_of(stream, tokens, 0)}
    monkeypatch.setattr(sensitivity, "ROWS", 24)
    for matrix in sensitivities_of(stream, tokens, 0):
        assert len(matrix.rows) <= 24
        torch.testing.assert_close(matrix.columns, all_rows[matrix.name].columns)
        assert float(matrix.information.sum()) == pytest.approx(
            float(matrix.columns.sum()), rel=0.25
        )


def test_rows_are_sampled_in_proportion_to_size() -> None:
    total = torch.ones(100)
    total[7] = 100.0
    rows, weights = sample_rows(total, 20)
    assert 7 in rows.tolist()
    assert len(rows) <= 20
    assert float((weights * total[rows]).sum()) == pytest.approx(float(total.sum()), rel=0.1)
    rows, weights = sample_rows(total, 100)
    assert rows.tolist() == list(range(100))
    assert weights.tolist() == [1.0] * 100


def test_rows_without_information_are_sampled_evenly() -> None:
    rows, weights = sample_rows(torch.zeros(100), 10)
    assert rows.tolist() == list(range(5, 100, 10)) or len(rows) == 10
    assert float(weights.sum()) == pytest.approx(100, rel=1e-3)


def test_every_channel_has_some_importance() -> None:
    importance = column_importance(torch.tensor([4.0, 0.0]))
    assert importance.tolist() == pytest.approx([4.02, 0.02])


@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe", "lfm3"])
def test_hidden_states_of_the_sampling_replace_the_forward_pass(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setitem(sampled_text.BATCH, "cpu", 3)
    stream = StreamedDecoder(make_checkpoint(model_type))
    tokens, hidden = sample_texts_with_states(stream, 5, 8, 0, _silent)
    assert torch.equal(tokens, sample_texts(stream, 5, 8, 0, _silent))
    messages: list[str] = []
    layers = compute_sensitivities(stream, tokens, 0, messages.append, hidden=hidden)
    actual = {s.name: s for s in chain.from_iterable(layers)}
    assert not any("forward" in message for message in messages)
    for expected in sensitivities_of(stream, tokens, 0):
        columns = actual[expected.name].columns
        torch.testing.assert_close(columns, expected.columns, rtol=1e-3, atol=1e-6)
