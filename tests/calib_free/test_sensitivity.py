from __future__ import annotations

import pytest
import torch

from lfmc.calib_free.sample import logits_of, sample
from lfmc.calib_free.sensitivity import column_importance, fisher_diagonal
from tests.calib_free.conftest import MakeCheckpoint

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "name", ["model.layers.0.conv.out_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
)
def test_it_predicts_the_kl_of_random_errors(make_checkpoint: MakeCheckpoint, name: str) -> None:
    decoder = make_checkpoint("lfm2").decoder()
    tokens = sample(decoder, 64, 16, 0)
    fisher = fisher_diagonal(decoder, [name], tokens)[name]
    weight = decoder.get_parameter(name)
    original = weight.clone()
    noise = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        p = torch.cat(list(logits_of(decoder, tokens))).double().log_softmax(-1)
        weight.copy_(original + noise)
        q = torch.cat(list(logits_of(decoder, tokens))).double().log_softmax(-1)
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    predicted = 0.5 * float((fisher * noise.square()).sum())
    assert predicted == pytest.approx(measured, rel=0.35)


def test_the_decoder_is_left_as_it_was(make_checkpoint: MakeCheckpoint) -> None:
    decoder = make_checkpoint("lfm2_moe").decoder()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    told: list[str] = []
    fisher_diagonal(decoder, [EMBEDDING], sample(decoder, 2, 6, 0), told.append)
    assert told == ["sensitivity: text 1 of 2", "sensitivity: text 2 of 2"]
    assert not any(p.requires_grad or p.grad is not None for p in decoder.parameters())
    assert all(torch.equal(before[n], value) for n, value in decoder.state_dict().items())
    hooks = decoder.get_parameter(EMBEDDING)._post_accumulate_grad_hooks
    assert not hooks


def test_every_channel_matters_a_little() -> None:
    importance = column_importance(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert importance.tolist() == pytest.approx([4.02, 0.02])
