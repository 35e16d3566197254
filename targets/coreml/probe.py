"""Compare every n-bit operator of a package in isolation: its input, and the plan's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, fx

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung, compare_logits, operators_rung
from lfmc.targets.base import Artifact
from lfmc.targets.coreml.interpreter import Interpreter
from lfmc.targets.coreml.names import DECODE, output_name

TITLE = "every n-bit operator of the artifact, alone, in float16"
TOKENS = 8
# Weights and results are rounded to float16, 2^-11 each, and the errors of a sum partly cancel.
TOLERANCE = 1e-3


def operator_parity(program: Program, folder: Path, artifact: Artifact) -> Rung:
    """Return the worst operator of each kind over some decoded tokens; `program` is bound."""
    return operators_rung(TITLE, TOLERANCE, _results(program, folder, artifact))


def _results(program: Program, folder: Path, artifact: Artifact) -> Iterator[CaseResult]:
    nodes = {node.name: node for node in program.graph.nodes}
    watch = {name for probe in artifact.probes for name in (*probe.inputs, probe.output)}
    interpreter = Interpreter(folder, exact=False)
    state, io_states = interpreter.new_state(), interpreter.new_io_states()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(program.config.vocab_size, (TOKENS,), generator=generator).int()
    for position, token in enumerate(ids):
        inputs = {
            "input_ids": token.view(1, 1),
            "position": torch.tensor([position], dtype=torch.int32),
        }
        values = interpreter.call(DECODE, {**inputs, **io_states}, state, watch)
        values.update(inputs)
        io_states = {key: values[output_name(key)] for key in io_states}
        for probe in artifact.probes:
            (name,) = probe.inputs
            expected = _run_operator(nodes[probe.node], values[name], program.constant)
            yield compare_logits(probe.kind, values[probe.output].float(), expected)


def _run_operator(node: fx.Node, x: Tensor, constant: Callable[[str], Tensor]) -> Tensor:
    """Run an operator of the program, with its weights, on `x`."""

    def value(argument: object) -> object:
        return constant(str(argument.target)) if isinstance(argument, fx.Node) else argument

    x = x.float() if x.is_floating_point() else x.long()
    return node.target(x, *map(value, node.args[1:]))  # type: ignore[operator, no-any-return]
