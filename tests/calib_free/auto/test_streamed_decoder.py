from __future__ import annotations

import pytest
import torch

from lfmc.calib_free.auto import sampled_text as texts
from lfmc.calib_free.auto import streamed_decoder as streamed
from lfmc.calib_free.auto.sampled_text import sample_texts, sample_tokens
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.errors import UnsupportedError
from lfmc.model import initial_state
from tests.calib_free.conftest import MakeCheckpoint


def _silent(message: str) -> None:
    pass


@pytest.mark.parametrize("resident_nbytes", [0, 1 << 20])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe", "lfm3"])
def test_it_matches_the_decoder(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    tied: bool,
    resident_nbytes: int,
) -> None:
    monkeypatch.setattr(streamed, "matmul_dtype", lambda device: torch.float32)
    monkeypatch.setattr(streamed, "RESIDENT_NBYTES", resident_nbytes)
    checkpoint = make_checkpoint(model_type, tie_word_embeddings=tied)
    tokens = torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(0))
    states = initial_state(checkpoint.config, 3, 10)
    with torch.inference_mode():
        expected, expected_states = checkpoint.decoder()(tokens, torch.arange(10), states)
        stream = StreamedDecoder(checkpoint)
        hidden, new_states = stream.hidden(tokens, torch.arange(10), states)
        logits = torch.cat([part for _, part, _ in stream.logits(hidden)])
        last, _ = stream.hidden(tokens[:, 9:], torch.tensor([9]), states_before(stream, tokens))
        step = torch.cat([part for _, part, _ in stream.logits(last)])
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(list(new_states), list(expected_states))
    torch.testing.assert_close(step, expected[:, 9:])


def states_before(stream: StreamedDecoder, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the states after all tokens but the last."""
    count, length = tokens.shape
    states = initial_state(stream.config, count, length)
    return stream.hidden(tokens[:, :-1], torch.arange(length - 1), states)[1]


def test_bfloat16_is_close(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("lfm2")
    tokens = torch.arange(12).view(2, 6)
    states = initial_state(checkpoint.config, 2, 6)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(streamed, "matmul_dtype", lambda device, dtype=dtype: dtype)
        stream = StreamedDecoder(checkpoint)
        with torch.inference_mode():
            outputs.append(stream.hidden(tokens, torch.arange(6), states)[0])
    torch.testing.assert_close(*outputs, rtol=0.1, atol=0.1)
    assert not torch.equal(*outputs)


def test_text_starts_at_the_start_token_and_follows_the_seed(
    make_checkpoint: MakeCheckpoint,
) -> None:
    stream = StreamedDecoder(make_checkpoint("lfm2_moe"))
    first, second, other_seed = (sample_texts(stream, 3, 12, seed, _silent) for seed in (0, 0, 1))
    assert (first[:, 0] == 1).all()
    assert torch.equal(first, second)
    assert not torch.equal(first, other_seed)


def test_tokens_are_sampled_by_their_probability(make_checkpoint: MakeCheckpoint) -> None:
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0]).expand(8000, 4)
    tokens = sample_tokens(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens, minlength=4) / 8000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.02, rtol=0)


def test_a_model_without_start_token_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    stream = StreamedDecoder(make_checkpoint("lfm2", bos_token_id=None))
    with pytest.raises(UnsupportedError, match="no start token"):
        sample_texts(stream, 1, 4, 0, _silent)


def test_varied_texts_do_not_depend_on_batches(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StreamedDecoder(make_checkpoint("lfm2"))
    one_batch = sample_texts(stream, 12, 6, 0, _silent, varied=8)
    monkeypatch.setitem(texts.BATCH, "cpu", 5)
    batches = sample_texts(stream, 12, 6, 0, _silent, varied=8)
    monkeypatch.setattr(streamed, "CHUNK", 64)  # one text's logits at a time
    single = sample_texts(stream, 12, 6, 0, _silent, varied=8)
    assert torch.equal(one_batch[:8, 1], batches[:8, 1])
    assert torch.equal(batches, single)
    # More than four of eight differ; the beginnings that the model samples are nearly all equal.
    assert len(one_batch[:8, 1].unique()) > 4
    assert (one_batch[:, 2:] != one_batch[:1, 2:]).any()
