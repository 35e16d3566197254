"""All passes on whole decoders: the operators that remain, and the results of the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.graph.program import Program, operator_name
from lfmc.graph.trace import TraceSpec, trace
from lfmc.model import DecoderConfig, initial_state
from lfmc.passes.base import apply
from lfmc.passes.pipeline import pipeline
from tests.factories import random_tokens
from tests.passes.graphs import QuantizedWeights

CONTEXT = 16
EXPERTS = (Format(2, 32, True, "float16"), Format(4, 32, False, "float16"), Floats("float32"))


def plan_formats(checkpoint: Checkpoint) -> dict[str, Format | Floats]:
    """Return formats of every kind, unlike the plan of any method."""
    formats: dict[str, Format | Floats] = {}
    for index, (name, info) in enumerate(checkpoint.tensors.items()):
        if ".experts." in name:
            formats[name] = EXPERTS[index % 3]
        elif "embed_tokens" in name:
            formats[name] = Format(8, 32, False, "float16")
        elif len(info.shape) != 2 or "gate" in name:
            formats[name] = Floats("float32")
        else:
            formats[name] = Format(3, 32, "proj" in name, "float16")
    return formats


def expected_operators(config: DecoderConfig) -> Counter[str]:
    layers, convs = config.num_layers, config.layer_types.count("conv")
    attentions = layers - convs
    sparse = sum(config.is_moe_layer(i) for i in range(layers))
    dense = layers - sparse
    merged = dense + (0 if config.attention_bias else attentions)
    gates = attentions if config.attention_gate else 0
    return Counter(
        {
            "lfm.embedding_nbits": 1,
            "lfm.rms_norm": 1 + (2 * layers if config.sandwich_norm else 0),
            "lfm.add_rms_norm": 2 * layers,
            "lfm.gated_short_conv": convs,
            "lfm.attention": attentions,
            "lfm.swiglu": dense,
            "lfm.moe": sparse,
            # in_proj and out_proj; q/k/v and out; w1/w3 and w2; the head
            "lfm.linear_nbits": 2 * convs
            + (4 if config.attention_bias else 2) * attentions
            + 2 * dense
            + 1,
            "aten.split_with_sizes": merged,
            "aten.linear": gates + sparse,  # the gate of lfm3, and routers
            "aten.sigmoid": gates + sparse,
            "aten.add": sparse if config.moe and config.moe.use_bias else 0,  # the expert bias
            "aten.flatten": attentions + sparse,
            "aten.view_as": sparse,
            "aten.unsqueeze": gates,
            "aten.mul": gates,
        }
    )


def operators(program: Program) -> Counter[str]:
    calls = (n for n in program.graph.nodes if n.op == "call_function")
    ignored = ("getitem", "lfm.dequantize")
    return Counter(name for name in map(operator_name, calls) if name not in ignored)


def assert_equals_decoder(
    program: Program, checkpoint: Checkpoint, batch: int, length: int
) -> None:
    weights = quantized_weights(checkpoint)
    decoder = checkpoint.decoder({n: weights.dequantized(n) for n in checkpoint.tensors})
    state = [torch.randn(s.shape) for s in initial_state(checkpoint.config, batch, CONTEXT)]
    tokens = random_tokens(checkpoint.config, batch, length)
    positions = torch.arange(3, 3 + length)
    logits, states = decoder(tokens, positions, state)
    results = program.run(tokens, positions, *state)
    for actual, expected in zip(results, (logits, *states), strict=True):
        assert float((actual - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def quantized_weights(checkpoint: Checkpoint) -> QuantizedWeights:
    constants = checkpoint.decoder().state_dict()
    tensors: dict[str, Tensor] = {name: value.float() for name, value in constants.items()}
    return QuantizedWeights(tensors, plan_formats(checkpoint))


def quantized_program(checkpoint: Checkpoint, spec: TraceSpec, merge: bool = True) -> Program:
    program = trace(checkpoint.config, spec)
    apply(pipeline(plan_formats(checkpoint), merge=merge), program)
    program.bind(quantized_weights(checkpoint).value)
    return program


@pytest.mark.parametrize("kind", ["lfm2", "lfm2_moe", "lfm3"])
def test_a_dynamic_graph(any_checkpoint: Callable[[str], Checkpoint], kind: str) -> None:
    checkpoint = any_checkpoint(kind)
    program = quantized_program(checkpoint, TraceSpec(CONTEXT, batch=None, length=None))
    assert operators(program) == expected_operators(checkpoint.config)
    for batch, length in ((1, 1), (1, 5), (3, 4)):
        assert_equals_decoder(program, checkpoint, batch, length)


@pytest.mark.parametrize(
    ("kind", "cache_write"),
    [
        ("lfm2-conv-bias", "index_copy"),
        ("lfm2-untied", "scatter"),
        ("lfm2_moe-no-bias", "scatter"),
        ("lfm2_moe-scaled", "one_hot"),
        ("lfm3-attention-bias", "one_hot"),
        ("lfm3-plain", "index_copy"),
    ],
)
def test_a_static_graph(
    any_checkpoint: Callable[[str], Checkpoint], kind: str, cache_write: str
) -> None:
    checkpoint = any_checkpoint(kind)
    program = quantized_program(checkpoint, TraceSpec(CONTEXT, 1, 3, cache_write))
    assert operators(program) == expected_operators(checkpoint.config)
    assert_equals_decoder(program, checkpoint, 1, 3)


def test_without_merging(any_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = any_checkpoint("lfm2")
    program = quantized_program(checkpoint, TraceSpec(CONTEXT, 1, 1), merge=False)
    assert program.count("aten.split_with_sizes") == 0
    assert program.count("lfm.linear_nbits") == 2 * 2 + 4 * 2 + 3 * 4 + 1
    assert_equals_decoder(program, checkpoint, 1, 1)


def test_every_constant_is_used_and_every_stored_tensor_is_a_constant(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    checkpoint = any_checkpoint("lfm2_moe")
    program = trace(checkpoint.config, TraceSpec(CONTEXT, 1, 1))
    apply(pipeline(plan_formats(checkpoint)), program)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    assert targets == set(program.weights)
    sources = {source for weight in program.weights.values() for source in weight.sources}
    assert sources == set(checkpoint.tensors)
