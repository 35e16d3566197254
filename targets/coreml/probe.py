"""Every n-bit operator of a package on its own: its input in the package, the plan's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, fx

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung, difference, operators_rung
from lfmc.targets.base import Artifact
from lfmc.targets.coreml.interpreter import Interpreter
from lfmc.targets.coreml.names import DECODE, output_name

TITLE = "every n-bit operator of the artifact, alone, in float16"
TOKENS = 8
# Weights and the result are rounded to float16: 2^-11 each, and errors of a sum partly cancel.
TOLERANCE = 1e-3


def operator_parity(program: Program, folder: Path, artifact: Artifact) -> Rung:
    """The worst operator of each kind, over some decoded tokens; `program` is bound."""
    return operators_rung(TITLE, TOLERANCE, _results(program, folder, artifact))


def _results(program: Program, folder: Path, artifact: Artifact) -> Iterator[CaseResult]:
    nodes = {node.name: node for node in program.graph.nodes}
    attributes = dict(program.module.named_buffers())
    watch = {name for probe in artifact.probes for name in (*probe.inputs, probe.output)}
    interpreter = Interpreter(folder, exact=False)
    state, passed = interpreter.new_state(), interpreter.new_passed()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(program.config.vocab_size, (TOKENS,), generator=generator).int()
    for position, token in enumerate(ids):
        given = {
            "input_ids": token.view(1, 1),
            "position": torch.tensor([position], dtype=torch.int32),
        }
        found = interpreter.call(DECODE, {**given, **passed}, state, watch)
        found.update(given)
        passed = {key: found[output_name(key)] for key in passed}
        for probe in artifact.probes:
            (name,) = probe.inputs
            expected = _alone(nodes[probe.node], found[name], attributes)
            yield difference(probe.kind, found[probe.output].float(), expected)


def _alone(node: fx.Node, given: Tensor, attributes: Mapping[str, Tensor]) -> Tensor:
    """The program's own operator, with its weights, on an input of its own."""

    def value(argument: object) -> object:
        return attributes[str(argument.target)] if isinstance(argument, fx.Node) else argument

    first = given.float() if given.is_floating_point() else given.long()
    return node.target(first, *map(value, node.args[1:]))  # type: ignore[operator, no-any-return]
