"""The graphs of an accelerator, in torch behind a host, against the program that they come from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.lowering.build import build
from lfmc.machine.progress import Silent
from lfmc.parity.compare import cases, compare
from lfmc.run.stepper import TorchStepper
from lfmc.targets.base import Request, get_target
from lfmc.targets.npu.bound_constants import Bound
from lfmc.targets.npu.forms import BY_TAPS, PLAIN, Forms, Style
from lfmc.targets.npu.graph import traced
from lfmc.targets.npu.host import HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.reference import Rounded
from lfmc.targets.npu.run_program import run_program
from tests.factories import KINDS
from tests.targets.lowering import choose_formats
from tests.targets.qualcomm.programs import eight_bit

CONTEXT = 96
TEXT_KINDS = [kind for kind in KINDS if not kind.endswith("_vl")]


def keep(value: Tensor, name: str) -> Tensor:
    return value


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("style", [PLAIN, BY_TAPS, Style(by_parts=True)])
def test_matrix(any_checkpoint: Callable[[str], Checkpoint], kind: str, style: Style) -> None:
    """Every way to feed tokens: chunks that are filled up, single tokens, a reset, a window."""
    checkpoint = any_checkpoint(kind)
    config, target = checkpoint.config, get_target("qualcomm")
    plan = choose_formats(checkpoint, eight_bit, target.capabilities(config))
    made, _ = build(checkpoint, target, plan, Request(CONTEXT, {}), Silent())
    made.bind()
    program, weights = made.program, made.weights
    interface, given = Interface.of(config, CONTEXT, 16), Bound(program)
    table = weights.dequantized("model.embed_tokens.weight")

    def execute(count: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        own = interface.of_tokens(count)
        assert {name: tuple(value.shape) for name, value in inputs.items()} == own.inputs
        with torch.no_grad():
            outputs = run_program(Forms(program, own, given, keep, style), inputs)
        assert {name: tuple(value.shape) for name, value in outputs.items()} == own.outputs
        return outputs

    host = HostStepper(interface, [1, 16], execute, lambda ids: table[ids])  # type: ignore[arg-type]
    plain = TorchStepper(program.module, config, CONTEXT)
    matrix = cases(config, CONTEXT, full=True)
    rung = compare(3, "host", host, plain, matrix, config.vocab_size, tolerance=1e-5)
    assert rung.passed, rung

    # What parity holds artifacts against has a program's states, and the same graphs.
    alike = Rounded(program, interface, given, lambda ids: table[ids], keep, style)
    reference = TorchStepper(alike, config, CONTEXT)
    rung = compare(3, "reference", reference, plain, matrix, config.vocab_size, tolerance=1e-5)
    assert rung.passed, rung


def test_names_are_the_same_for_every_length(any_checkpoint: Callable[[str], Checkpoint]) -> None:
    """Steps are found with one length, and used with others."""
    checkpoint = any_checkpoint("lfm2_moe")
    config, target = checkpoint.config, get_target("qualcomm")
    plan = choose_formats(checkpoint, eight_bit, target.capabilities(config))
    made, _ = build(checkpoint, target, plan, Request(CONTEXT, {}), Silent())
    interface = Interface.of(config, CONTEXT, 16)

    def shape(sources: tuple[str, ...]) -> tuple[int, ...]:
        found = tuple(checkpoint.tensors[sources[0]].shape)
        return found[::-1] if len(found) == 2 else found

    graphs = [
        traced(made.program, interface.of_tokens(count), shape, keep, BY_TAPS) for count in (1, 16)
    ]
    assert graphs[0].kept == graphs[1].kept
    assert graphs[0].constants == graphs[1].constants
    assert len(graphs[0].kept) > 100
