"""halve-rotary-angles, the example pass of docs/architecture.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.toy_pass import HalveRotaryAngles
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.graph.trace import TraceSpec, trace
from lfmc.parity.compare import FLOAT_TOLERANCE
from lfmc.passes.base import apply
from lfmc.passes.remove_no_ops import RemoveNoOps
from lfmc.run.stepper import TorchStepper, decoder_stepper
from tests.passes.graphs import count_rewrites, program_of, random


class Angles(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        angles = torch.cat([x, x], dim=-1)
        return angles.cos(), angles.sin(), torch.cat([x, y], dim=-1).cos()


def test_fires_only_if_both_halves_are_equal() -> None:
    inputs = random(2, 4), random(2, 4, seed=1)
    program = program_of(Angles(), *inputs)
    assert count_rewrites(HalveRotaryAngles(), program, *inputs) == 2
    sizes = {node.meta["val"].shape[-1] for node in program.nodes("aten.sin")}
    assert sizes == {4}
    assert sorted(n.meta["val"].shape[-1] for n in program.nodes("aten.cos")) == [4, 8]


def test_the_logits_of_the_decoder_keep_every_bit() -> None:
    checkpoint = open_checkpoint()
    tokens = torch.arange(20)

    def logits(*passes: HalveRotaryAngles) -> Tensor:
        program = trace(checkpoint.config, TraceSpec(context=32))
        record = apply([RemoveNoOps(), *passes], program)
        assert [step.changed for step in record[1:]] == [2 for _ in passes]
        weights = checkpoint.decoder().state_dict()
        module = program.bind(lambda name, weight: weights[name])
        return TorchStepper(module, checkpoint.config, 32).step(tokens)

    actual = logits(HalveRotaryAngles())
    assert torch.equal(actual, logits())
    expected = decoder_stepper(checkpoint.decoder(), 32).step(tokens)
    assert (actual - expected).abs().max() <= FLOAT_TOLERANCE * expected.abs().max()
