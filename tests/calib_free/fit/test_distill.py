from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lfmc.calib_free.auto.sampled_text import sample_texts
from lfmc.calib_free.auto.sensitivity import channel_information
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit.blocks import Block, embed, head_logits, planned_kl
from lfmc.calib_free.fit.blockwise import fit_blocks
from lfmc.calib_free.fit.distill import distill, kl
from lfmc.calib_free.fit.fit import with_fitted
from lfmc.calib_free.fit.student import Student
from lfmc.calib_free.fit.training_loop import TrainingOptions, TrainingSchedule
from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.calib_free.plan.fitted_tensors import Parts
from lfmc.calib_free.plan.planned_tensors import dequantized_weights
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.parity.text_quality import logits_of
from tests.calib_free.conftest import MakeCheckpoint

SHORT = TrainingSchedule(steps=30, batch=4)
LENGTH = 24
Stage = Callable[[Checkpoint, BitPlan, Tensor, TrainingOptions, TrainingSchedule], dict[str, Parts]]
STAGES = pytest.mark.parametrize("stage", [distill, fit_blocks], ids=lambda f: f.__name__)


def texts_of(checkpoint: Checkpoint, count: int = 32) -> Tensor:
    return sample_texts(StreamedDecoder(checkpoint), count, LENGTH, 1, lambda message: None)


def options() -> TrainingOptions:
    return TrainingOptions(0, lambda message: None)


@STAGES
@pytest.mark.parametrize("kind", ["lfm2", "lfm2_moe", "lfm3"])
def test_training_reduces_the_kl_to_the_teacher(
    make_checkpoint: MakeCheckpoint, kind: str, stage: Stage
) -> None:
    changes = {"layer_types": ["conv", "sliding_attention", "full_attention"]}
    checkpoint = make_checkpoint(kind, **(changes if kind == "lfm3" else {}))
    plan = make_plan(checkpoint, GENERIC, "2", None)
    texts = texts_of(checkpoint)
    fitted = with_fitted(plan, stage(checkpoint, plan, texts[:16], options(), SHORT), "here")
    check_plan(fitted, checkpoint, GENERIC)
    before = planned_kl(checkpoint, plan, texts[16:])
    assert planned_kl(checkpoint, fitted, texts[16:]) < 0.95 * before


@STAGES
def test_the_same_seed_gives_the_same_result(make_checkpoint: MakeCheckpoint, stage: Stage) -> None:
    checkpoint = make_checkpoint("lfm2")
    plan, texts = make_plan(checkpoint, GENERIC, "3", None), texts_of(checkpoint)
    first, second = (stage(checkpoint, plan, texts, options(), SHORT) for _ in range(2))
    for name, parts in first.items():
        assert all(torch.equal(value, second[name][p]) for p, value in parts.items()), name


def test_routers_gates_and_biases_are_not_trained(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    plan, texts = make_plan(checkpoint, GENERIC, "3", None), texts_of(checkpoint)
    fixed = {n for n in checkpoint.tensors if n.endswith((".gate.weight", "expert_bias"))}
    outside = {n for n in checkpoint.tensors if ".layers." not in n}
    assert fixed
    assert outside
    end_to_end = distill(checkpoint, plan, texts, options(), TrainingSchedule(1, 4))
    assert set(end_to_end) == set(checkpoint.tensors) - fixed
    blockwise = fit_blocks(checkpoint, plan, texts, options(), TrainingSchedule(1, 4))
    assert set(blockwise) == set(checkpoint.tensors) - fixed - outside


@pytest.mark.parametrize("kind", ["lfm2", "lfm2_moe"])
def test_planned_kl_matches_the_whole_model(make_checkpoint: MakeCheckpoint, kind: str) -> None:
    checkpoint = make_checkpoint(kind)
    plan, texts = make_plan(checkpoint, GENERIC, "3", None), texts_of(checkpoint, 20)
    decoders = checkpoint.decoder(), checkpoint.decoder(dequantized_weights(checkpoint, plan))
    with torch.no_grad():
        expected, actual = (torch.cat(list(logits_of(d, texts))) for d in decoders)
    kl_of_logits = float(kl(expected, actual))
    assert planned_kl(checkpoint, plan, texts) == pytest.approx(kl_of_logits, rel=1e-4)


def test_channel_information_predicts_the_kl(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    texts = texts_of(checkpoint, 200)
    information = channel_information(StreamedDecoder(checkpoint), texts, 0, lambda message: None)
    # The KL of a small random change after the second layer, against half its Fisher norm.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        hidden = embed(texts, checkpoint.weights)
        for index in range(2):
            hidden = Block(checkpoint, index, "cpu")(hidden)
        noise = 0.02 * torch.randn(hidden.shape, generator=generator)
        outputs = [Block(checkpoint, 2, "cpu")(h) for h in (hidden, hidden + noise)]
        logits = [head_logits(checkpoint.config, h, checkpoint.weights) for h in outputs]
    # Later tokens depend on the change too: like the information, it is averaged over all tokens.
    expected = 0.5 * float((noise.square() * information[1]).sum(-1).mean())
    assert float(kl(*logits)) == pytest.approx(expected, rel=0.15)


def test_a_student_starts_from_the_planned_weights(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2_moe")
    plan = make_plan(checkpoint, GENERIC, "3", None)
    planned = dequantized_weights(checkpoint, plan)
    with torch.no_grad():
        weights = Student(checkpoint, plan)()
    assert set(weights) == set(checkpoint.tensors)
    for name, weight in weights.items():
        assert torch.equal(weight, planned[name]), name


def test_kl_by_hand() -> None:
    expected = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    logits = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    by_hand = (0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()) / 2
    assert float(kl(expected, logits)) == pytest.approx(float(by_hand), rel=1e-5)
