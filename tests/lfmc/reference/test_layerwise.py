"""The references that run layer by layer agree with whole models, and read each weight once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.checkpoint.weight_files import LazyTensors
from lfmc.errors import InputError
from lfmc.graph.program import Weight
from lfmc.reference.layerwise_decoder import LayerwiseDecoder
from lfmc.reference.layerwise_program import LayerwiseProgram, split
from lfmc.reference.transformers_model import LayerwiseTransformers
from lfmc.run.conversation import Conversation, ReplayStepper, SteppedModel
from lfmc.run.stepper import TorchStepper, decoder_stepper
from tests.conftest import TRAINED
from tests.factories import KINDS, random_tokens, reference_logits
from tests.targets.lowering import build_for, four_bit, mixed


def conversations_of(checkpoint: Checkpoint) -> list[Conversation]:
    """Return a prefill with decoding, a prompt in chunks that begins alike, and another prompt."""
    first, second = (random_tokens(checkpoint.config, 1, 20, seed)[0] for seed in (1, 2))
    return [
        Conversation((first[:12], *first[12:].split(1))),
        Conversation(first[:15].split([7, 8]), earlier=second[:3]),
        Conversation((second[:9],)),
    ]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", [*KINDS, *TRAINED])
def test_transformers(any_checkpoint: Callable[[str], Checkpoint], name: str) -> None:
    checkpoint = any_checkpoint(name)
    conversations = conversations_of(checkpoint)
    replies = LayerwiseTransformers(checkpoint).run(conversations)
    for conversation, reply in zip(conversations, replies, strict=True):
        tokens = conversation.tokens[None]
        expected = reference_logits(checkpoint.path, tokens, [tokens.shape[1]])
        assert_close(reply.logits, expected[0])


def test_transformers_names_a_missing_tensor(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("lfm2"))
    name = "model.layers.1.ffn_norm.weight"
    del checkpoint.tensors[name]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="that the checkpoint does not have") as caught:
        LayerwiseTransformers(checkpoint).run(conversations_of(checkpoint))
    assert caught.value.got == name


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder(any_checkpoint: Callable[[str], Checkpoint], kind: str) -> None:
    checkpoint = any_checkpoint(kind)
    reads: Counter[str] = Counter()

    def load(name: str) -> Tensor:
        reads[name] += 1
        return checkpoint.load(name)

    conversations = conversations_of(checkpoint)
    layerwise = LayerwiseDecoder(checkpoint.config, LazyTensors(checkpoint.tensors, load), 24)
    whole = SteppedModel(decoder_stepper(checkpoint.decoder(), 24))
    for actual, expected in zip(
        layerwise.run(conversations), whole.run(conversations), strict=True
    ):
        assert_close(actual.logits, expected.logits)
    table = "model.embed_tokens.weight"
    assert reads == {
        **dict.fromkeys(checkpoint.tensors, 1),
        table: 2 if checkpoint.config.tied_embedding else 1,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_program(any_checkpoint: Callable[[str], Checkpoint], kind: str) -> None:
    build = build_for(any_checkpoint(kind), mixed, "onnx", {})
    reads: Counter[str] = Counter()

    def value(name: str, weight: Weight) -> Tensor:
        reads[name] += 1
        return build.weights.value(name, weight)

    build.program.bind(value)
    conversations = conversations_of(build.checkpoint)
    layerwise = LayerwiseProgram(build.program, 24)
    replies = layerwise.run(conversations)
    assert set(reads) == set(build.program.weights)
    shared = {name for name, count in reads.items() if count > 1}  # a rotary table, a tied head
    assert all(name.startswith(("rope.", "model.embed_tokens")) for name in shared), shared
    whole = SteppedModel(TorchStepper(build.program.run, build.checkpoint.config, 24))
    for actual, expected in zip(replies, whole.run(conversations), strict=True):
        assert_close(actual.logits, expected.logits)


def test_a_segment_has_the_weights_of_one_operator(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    """No more than one matrix product of a dense model is in memory at a time."""
    program = build_for(any_checkpoint("lfm2"), four_bit, "onnx", {}).program
    segments = list(split(program))
    nodes = [node for segment in segments for node in segment.nodes]
    assert nodes == [node for node in program.graph.nodes if node.op == "call_function"]
    updated = [state for segment in segments for state in segment.states]
    assert updated == list(range(len(program.states)))
    products = [
        sum(node.target is torch.ops.lfm.linear_nbits.default for node in segment.nodes)
        for segment in segments
    ]
    assert max(products) == 1


def test_the_choice_of_experts_is_recorded(any_checkpoint: Callable[[str], Checkpoint]) -> None:
    build = build_for(any_checkpoint("lfm2_moe"), mixed, "onnx", {})
    (reply, *_) = LayerwiseProgram(build.program, 24).run(conversations_of(build.checkpoint))
    moe = build.checkpoint.config.moe
    assert moe is not None
    assert reply.choice is not None
    assert reply.choice.margins is not None
    assert reply.choice.experts.shape == (3, 20, moe.top_k)
    assert reply.choice.margins.shape == (3, 20)


def test_a_stepper_that_replays_the_conversation(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    checkpoint = any_checkpoint("lfm3")
    model = LayerwiseDecoder(checkpoint.config, checkpoint.weights, 24)
    conversations = conversations_of(checkpoint)
    replayed = SteppedModel(ReplayStepper(model, 24)).run(conversations)
    for actual, expected in zip(replayed, model.run(conversations), strict=True):
        assert_close(actual.logits, expected.logits)
