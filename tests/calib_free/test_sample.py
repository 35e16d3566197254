from __future__ import annotations

import pytest
import torch

from lfmc.calib_free.sample import logits_of, sample
from lfmc.errors import UnsupportedError
from lfmc.model import initial_state
from tests.calib_free.conftest import MakeCheckpoint


def test_text_starts_at_the_start_token_and_follows_the_seed(
    make_checkpoint: MakeCheckpoint,
) -> None:
    decoder = make_checkpoint("lfm2_moe").decoder()
    first, again, other = (sample(decoder, 3, 12, seed) for seed in (0, 0, 1))
    assert first.shape == (3, 12)
    assert (first[:, 0] == 1).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_come_as_often_as_the_model_says(make_checkpoint: MakeCheckpoint) -> None:
    decoder = make_checkpoint("lfm3").decoder()
    tokens = sample(decoder, 4000, 2, 0)
    states = initial_state(decoder.config, 1, 2)
    with torch.inference_mode():
        shares = decoder(torch.ones(1, 1, dtype=torch.int64), torch.tensor([0]), states)[0]
    expected = shares[0, 0].softmax(-1)
    seen = torch.bincount(tokens[:, 1], minlength=64) / 4000
    assert float((seen - expected).abs().sum()) < 0.2


def test_no_start_token_no_text(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(UnsupportedError, match="no start token"):
        sample(make_checkpoint("lfm2", bos_token_id=None).decoder(), 1, 4, 0)


def test_logits_do_not_depend_on_the_batch(make_checkpoint: MakeCheckpoint) -> None:
    decoder = make_checkpoint("lfm2").decoder()
    tokens = sample(decoder, 5, 9, 0)
    with torch.inference_mode():
        apart = torch.cat(list(logits_of(decoder, tokens, batch=2)))
        whole = torch.cat(list(logits_of(decoder, tokens, batch=8)))
    torch.testing.assert_close(apart, whole)
