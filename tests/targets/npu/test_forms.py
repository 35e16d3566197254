"""An accelerator's graphs, in torch with a host, agree with the program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.lowering.build import build
from lfmc.machine.progress import Silent
from lfmc.parity.compare import Rung, cases, compare
from lfmc.reference.layerwise_program import LayerwiseProgram
from lfmc.run.conversation import SteppedModel
from lfmc.run.stepper import Stepper, TorchStepper
from lfmc.targets.base import Request, get_target
from lfmc.targets.npu.bound_constants import BoundConstants
from lfmc.targets.npu.forms import BY_TAPS, DEFAULT_STYLE, Forms, Style
from lfmc.targets.npu.graph import trace_graph
from lfmc.targets.npu.host import HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.reference import RoundedReference
from lfmc.targets.npu.run_program import run_program
from tests.factories import KINDS
from tests.targets.lowering import choose_formats
from tests.targets.programs import some_slow
from tests.targets.qualcomm.programs import eight_bit

CONTEXT = 96
TEXT_KINDS = [kind for kind in KINDS if not kind.endswith("_vl")]


def leave_unrounded(value: Tensor, name: str) -> Tensor:
    return value


@pytest.mark.parametrize("kind", some_slow(TEXT_KINDS, ["lfm2_moe", "lfm3-attention-bias"]))
@pytest.mark.parametrize("style", [DEFAULT_STYLE, BY_TAPS, Style(by_parts=True)])
def test_the_host_agrees_with_the_program(
    any_checkpoint: Callable[[str], Checkpoint], kind: str, style: Style
) -> None:
    """Feed tokens in every way: padded chunks, single tokens, after a reset, beyond a window."""
    checkpoint = any_checkpoint(kind)
    config, target = checkpoint.config, get_target("qualcomm")
    plan = choose_formats(checkpoint, eight_bit, target.capabilities(config))
    export_build, _ = build(checkpoint, target, plan, Request(CONTEXT, {}), Silent())
    program, weights = export_build.program, export_build.weights
    interface, constants = Interface.from_config(config, CONTEXT, 16), BoundConstants(program)
    table = weights.dequantized("model.embed_tokens.weight")

    def execute(count: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        call = interface.with_tokens(count)
        assert {name: tuple(value.shape) for name, value in inputs.items()} == call.inputs
        with torch.no_grad():
            outputs = run_program(Forms(program, call, constants, leave_unrounded, style), inputs)
        assert {name: tuple(value.shape) for name, value in outputs.items()} == call.outputs
        return outputs

    host = HostStepper(interface, [1, 16], execute, lambda ids: table[ids])  # type: ignore[arg-type]
    in_torch = LayerwiseProgram(program, CONTEXT)
    matrix = cases(config, CONTEXT, full=True)

    def compare_with_program(stepper: Stepper) -> Rung:
        model = SteppedModel(stepper)
        return compare(3, "host", model, in_torch, matrix, config.vocab_size, tolerance=1e-5)

    rung = compare_with_program(host)
    assert rung.passed, rung

    # The reference of parity has the program's states, and the same graphs.
    module = RoundedReference(
        program, interface, constants, lambda ids: table[ids], leave_unrounded, style
    )
    rung = compare_with_program(TorchStepper(module, config, CONTEXT))
    assert rung.passed, rung


def test_value_names_are_the_same_for_every_length(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    """Ranges are observed in calls of one length, and used for the other lengths."""
    checkpoint = any_checkpoint("lfm2_moe")
    config, target = checkpoint.config, get_target("qualcomm")
    plan = choose_formats(checkpoint, eight_bit, target.capabilities(config))
    export_build, _ = build(checkpoint, target, plan, Request(CONTEXT, {}), Silent())
    interface = Interface.from_config(config, CONTEXT, 16)

    def shape_of(sources: tuple[str, ...]) -> tuple[int, ...]:
        shape = tuple(checkpoint.tensors[sources[0]].shape)
        return shape[::-1] if len(shape) == 2 else shape

    graphs = [
        trace_graph(
            export_build.program, interface.with_tokens(count), shape_of, leave_unrounded, BY_TAPS
        )
        for count in (1, 16)
    ]
    assert graphs[0].value_names == graphs[1].value_names
    assert graphs[0].constants == graphs[1].constants
    assert len(graphs[0].value_names) > 100
