"""The methods of `Program`, on a small graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from lfmc.graph.program import Program, Weight, operator_name, set_attribute
from tests.passes.graphs import program_of


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * self.gain)


@pytest.fixture
def program() -> Program:
    return program_of(Scaled(), torch.ones(4, 2))


def test_text(program: Program) -> None:
    assert program.text().splitlines() == [
        "%gain = weight gain float32[2]",
        "%x = input float32[4, 2]",
        "%mul = aten.mul(%x, %gain)",
        "%relu = aten.relu(%mul)",
        "return [%relu]",
    ]


def test_nodes_by_name(program: Program) -> None:
    assert [node.name for node in program.nodes("aten.mul")] == ["mul"]
    assert program.count("aten.relu") == 1
    assert program.count("aten.add") == 0


def test_operator_name_of_a_python_function() -> None:
    graph = fx.Graph()
    assert operator_name(graph.call_function(len, ())) == "len"


def test_replace_erases_inputs_without_other_users(program: Program) -> None:
    x = next(n for n in program.graph.nodes if n.op == "placeholder")
    program.replace(next(program.nodes("aten.relu")), x)
    assert [n.op for n in program.graph.nodes] == ["placeholder", "output"]


def test_replace_keeps_inputs_with_other_users(program: Program) -> None:
    relu, mul = next(program.nodes("aten.relu")), next(program.nodes("aten.mul"))
    with program.graph.inserting_after(relu):
        neg = program.call(torch.ops.aten.neg.default, mul)
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = ((relu, neg),)
    program.replace(relu, neg)
    assert program.count("aten.mul") == 1
    assert program.count("aten.relu") == 0


def test_a_bound_program_reads_its_constants_when_it_runs(program: Program) -> None:
    calls = []

    def value(name: str, weight: Weight) -> Tensor:
        calls.append((name, weight))
        return torch.tensor([1.0, -1.0])

    run = program.bind(value)
    assert calls == []
    assert torch.equal(run(torch.full((1, 2), 5.0))[0], torch.tensor([[5.0, 0.0]]))
    assert calls == [("gain", Weight(("gain",)))]


def test_a_program_without_weights_does_not_run(program: Program) -> None:
    with pytest.raises(ValueError, match="not bound"):
        program.run(torch.ones(1, 2))


def test_bind_sets_added_weights(program: Program) -> None:
    node = program.add_weight("a.b+c.weight", Weight(("a.b", "a.c")), torch.ones(2))
    mul = next(program.nodes("aten.mul"))
    mul.args = (mul.args[0], node)
    module = program.bind(lambda name, weight: torch.full((2,), float(len(weight.sources))))
    assert torch.equal(module(torch.ones(1, 2))[0], torch.tensor([[2.0, 2.0]]))


def test_set_attribute_replaces_a_parameter() -> None:
    module = nn.Module()
    set_attribute(module, "a.b", torch.zeros(1))
    set_attribute(module, "a.b", torch.ones(1))
    assert torch.equal(module.get_submodule("a").b, torch.ones(1))
