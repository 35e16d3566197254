"""remove-dead-code: nodes without users, and constants that no node reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lfmc.graph.program import Program, Weight
from lfmc.passes.base import apply
from lfmc.passes.remove_dead_code import RemoveDeadCode
from tests.passes.graphs import count_rewrites, program_of, random, weight


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.gain = weight(4)

    def forward(self, x: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x * self.gain


def without_linear() -> Program:
    program = program_of(Pair(), random(2, 4), random(1))
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = ((output.args[0][1],),)
    return program


def test_fires(golden: Callable[[str, str], None]) -> None:
    program = without_linear()
    before = program.text()
    inputs = random(2, 4), random(1)
    assert (
        count_rewrites(RemoveDeadCode(), program, *inputs) == 3
    )  # the linear, its weight, its bias
    assert program.weights == {"gain": Weight(("gain",))}
    assert dict(program.module.named_children()) == {}
    golden("remove_dead_code", f"{before}\n--\n{program.text()}")


def test_unused_inputs_stay() -> None:
    program = without_linear()
    apply([RemoveDeadCode()], program)
    assert sum(n.op == "placeholder" for n in program.graph.nodes) == 2


def test_must_not_fire_where_everything_is_used() -> None:
    program = program_of(Pair(), random(2, 4), random(1))
    text, weights = program.text(), dict(program.weights)
    assert count_rewrites(RemoveDeadCode(), program, random(2, 4), random(1)) == 0
    assert (program.text(), program.weights) == (text, weights)


def test_a_chain_of_dead_nodes_is_removed_at_once() -> None:
    program = program_of(Pair(), random(2, 4), random(1))
    linear = next(program.nodes("aten.linear"))
    with program.graph.inserting_after(linear):
        first = program.call(torch.ops.aten.relu.default, linear)
    with program.graph.inserting_after(first):
        program.call(torch.ops.aten.neg.default, first)
    assert count_rewrites(RemoveDeadCode(), program, random(2, 4), random(1)) == 2
