"""Tracing with fake weights: graphs equal the decoder for all sizes that they allow."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.graph.program import Program, Weight
from lfmc.graph.trace import TraceSpec, trace
from lfmc.model import DecoderConfig, initial_state, read_config, state_specs
from lfmc.model.attention import CACHE_WRITES
from lfmc.passes.base import apply
from lfmc.passes.remove_no_ops import RemoveNoOps
from tests.factories import random_tokens

CONTEXT = 24
KINDS = ("lfm2_moe", "lfm3")  # the tests of the pipeline trace all kinds


def lfm2_8b(layers: int) -> DecoderConfig:
    """Return the configuration of the first layers of LFM2-8B-A1B."""
    attention = (2, 6, 10, 14, 18, 21)
    types = ["full_attention" if i in attention else "conv" for i in range(layers)]
    return read_config(
        {
            "model_type": "lfm2_moe",
            "vocab_size": 65536,
            "hidden_size": 2048,
            "intermediate_size": 7168,
            "moe_intermediate_size": 1792,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "num_dense_layers": 2,
            "layer_types": types,
        }
    )


def bind_checkpoint(program: Program, checkpoint: Checkpoint) -> Any:
    constants = checkpoint.decoder().state_dict()

    def value(name: str, weight: Weight) -> torch.Tensor:
        return constants[name] if weight.part == "constant" else checkpoint.load(name).float()

    return program.bind(value)


@pytest.fixture(scope="module", params=KINDS)
def dynamic(
    request: pytest.FixtureRequest, any_checkpoint: Callable[[str], Checkpoint]
) -> tuple[Checkpoint, Any]:
    """A checkpoint, and its graph with dynamic batch and length and real weights."""
    checkpoint = any_checkpoint(request.param)
    program = trace(checkpoint.config, TraceSpec(CONTEXT, batch=None, length=None))
    apply([RemoveNoOps()], program)  # removes metadata assertions, which change no result
    return checkpoint, bind_checkpoint(program, checkpoint)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (2, 1), (3, 5), (1, CONTEXT)])
def test_a_dynamic_graph_equals_the_decoder(
    dynamic: tuple[Checkpoint, Any], batch: int, length: int
) -> None:
    checkpoint, module = dynamic
    state = [torch.randn(s.shape) for s in initial_state(checkpoint.config, batch, CONTEXT)]
    tokens = random_tokens(checkpoint.config, batch, length)
    positions = torch.arange(CONTEXT - length, CONTEXT)
    logits, expected = checkpoint.decoder()(tokens, positions, state)
    results = module(tokens, positions, *state)
    assert len(results) == 1 + len(expected)
    for result, reference in zip(results, (logits, *expected), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_write", CACHE_WRITES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 4), (2, 3)])
def test_a_static_graph_equals_the_decoder(
    any_checkpoint: Callable[[str], Checkpoint], cache_write: str, batch: int, length: int
) -> None:
    checkpoint = any_checkpoint("lfm3")
    program = trace(checkpoint.config, TraceSpec(CONTEXT, batch, length, cache_write))
    state = initial_state(checkpoint.config, batch, CONTEXT)
    tokens, positions = random_tokens(checkpoint.config, batch, length), torch.arange(length)
    logits, expected = checkpoint.decoder()(tokens, positions, state)
    results = bind_checkpoint(program, checkpoint)(tokens, positions, *state)
    for result, reference in zip(results, (logits, *expected), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "length", "context"), [(None, None, 2), (2, None, 2), (1, 3, 3)])
def test_sizes_that_happen_to_be_equal_stay_independent(
    any_checkpoint: Callable[[str], Checkpoint], batch: int | None, length: int | None, context: int
) -> None:
    config = any_checkpoint("lfm2").config
    program = trace(config, TraceSpec(context, batch, length))
    inputs = {n.name: n.meta["val"].shape for n in program.graph.nodes if n.op == "placeholder"}
    tokens, positions = inputs["tokens"], inputs["positions"]
    assert isinstance(tokens[0], int) == (batch is not None)
    assert isinstance(tokens[1], int) == (length is not None)
    assert tokens[1] == positions[0]
    cache = next(shape for shape in inputs.values() if len(shape) == 4)
    assert isinstance(cache[2], int)
    assert cache[2] == context
    if batch is None and length is None:
        assert str(tokens[0]) != str(tokens[1])


def test_inputs_and_constants(any_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = any_checkpoint("lfm3")
    program = trace(checkpoint.config, TraceSpec(CONTEXT, length=3))
    assert program.states == state_specs(checkpoint.config, 1, CONTEXT)
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    shapes = [tuple(n.meta["val"].shape) for n in inputs]
    assert shapes == [(1, 3), (3,), *(state.shape for state in program.states)]
    stored = {name for name, weight in program.weights.items() if weight.part == "values"}
    assert stored == set(checkpoint.tensors)
    assert set(program.weights) - stored == {"rope.full_attention", "rope.sliding_attention"}


def test_a_traced_graph_names_no_device_but_the_cpu(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    program = trace(any_checkpoint("lfm2_moe").config, TraceSpec(CONTEXT, length=3))
    devices = {str(n.kwargs["device"]) for n in program.graph.nodes if n.kwargs.get("device")}
    assert devices <= {"cpu"}


def peak_memory_nbytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.parametrize(
    ("layers", "billions"), [(5, 1.3), pytest.param(24, 8.3, marks=pytest.mark.slow)]
)
def test_weights_take_no_memory(layers: int, billions: float) -> None:
    config, before = lfm2_8b(layers), peak_memory_nbytes()
    program = trace(config, TraceSpec(context=4096, length=1))
    sizes = {n.target: n.meta["val"].numel() for n in program.graph.nodes if n.op == "get_attr"}
    assert billions * 1e9 < sum(sizes.values()) < (billions + 0.1) * 1e9
    assert peak_memory_nbytes() - before < 1 << 30
    constants = dict(program.module.named_buffers())
    assert all(isinstance(value, FakeTensor) for value in constants.values())
    assert len(constants) == len(program.weights)
