from __future__ import annotations

import pytest
import torch

from lfmc.calib_free.auto import sampled_text as texts
from lfmc.calib_free.auto import streamed_decoder as streamed
from lfmc.calib_free.auto.sampled_text import choose, write_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.errors import UnsupportedError
from lfmc.model import initial_state
from tests.calib_free.conftest import MakeCheckpoint


def _silent(message: str) -> None:
    pass


@pytest.mark.parametrize("held", [0, 1 << 20])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["lfm2", "lfm2_moe", "lfm3"])
def test_it_is_the_decoder(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    tied: bool,
    held: int,
) -> None:
    monkeypatch.setattr(streamed, "matmul_dtype", lambda device: torch.float32)
    monkeypatch.setattr(streamed, "HELD_NBYTES", held)
    checkpoint = make_checkpoint(model_type, tie_word_embeddings=tied)
    tokens = torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(0))
    states = initial_state(checkpoint.config, 3, 10)
    with torch.inference_mode():
        expected, after = checkpoint.decoder()(tokens, torch.arange(10), states)
        stream = StreamedDecoder(checkpoint)
        hidden, new = stream.hidden(tokens, torch.arange(10), states)
        whole = torch.cat([logits for _, logits, _ in stream.logits(hidden)])
        last, _ = stream.hidden(tokens[:, 9:], torch.tensor([9]), states_before(stream, tokens))
        step = torch.cat([logits for _, logits, _ in stream.logits(last)])
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(list(new), list(after))
    torch.testing.assert_close(step, expected[:, 9:])


def states_before(stream: StreamedDecoder, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """States after all tokens but the last."""
    count, length = tokens.shape
    states = initial_state(stream.config, count, length)
    return stream.hidden(tokens[:, :-1], torch.arange(length - 1), states)[1]


def test_bfloat16_is_close(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("lfm2")
    tokens = torch.arange(12).view(2, 6)
    states = initial_state(checkpoint.config, 2, 6)
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(streamed, "matmul_dtype", lambda device, dtype=dtype: dtype)
        stream = StreamedDecoder(checkpoint)
        with torch.inference_mode():
            made.append(stream.hidden(tokens, torch.arange(6), states)[0])
    torch.testing.assert_close(*made, rtol=0.1, atol=0.1)
    assert not torch.equal(*made)


def test_text_starts_at_the_start_token_and_follows_the_seed(
    make_checkpoint: MakeCheckpoint,
) -> None:
    stream = StreamedDecoder(make_checkpoint("lfm2_moe"))
    first, again, other = (write_texts(stream, 3, 12, seed, _silent) for seed in (0, 0, 1))
    assert (first[:, 0] == 1).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_come_as_often_as_the_model_says(make_checkpoint: MakeCheckpoint) -> None:
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0]).expand(8000, 4)
    drawn = choose(logits, torch.Generator().manual_seed(0))
    seen = torch.bincount(drawn, minlength=4) / 8000
    torch.testing.assert_close(seen, logits[0].softmax(-1), atol=0.02, rtol=0)


def test_no_start_token_no_text(make_checkpoint: MakeCheckpoint) -> None:
    stream = StreamedDecoder(make_checkpoint("lfm2", bos_token_id=None))
    with pytest.raises(UnsupportedError, match="no start token"):
        write_texts(stream, 1, 4, 0, _silent)


def test_some_texts_begin_with_anything(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StreamedDecoder(make_checkpoint("lfm2"))
    whole = write_texts(stream, 12, 6, 0, _silent, varied=8)
    monkeypatch.setitem(texts.BATCH, "cpu", 5)
    parts = write_texts(stream, 12, 6, 0, _silent, varied=8)
    monkeypatch.setattr(streamed, "CHUNK", 64)  # one text's logits at a time
    ones = write_texts(stream, 12, 6, 0, _silent, varied=8)
    assert torch.equal(whole[:8, 1], parts[:8, 1])
    assert torch.equal(parts, ones)
    assert len(whole[:8, 1].unique()) > 4  # of eight; the model itself says much the same
    assert (whole[:, 2:] != whole[:1, 2:]).any()
