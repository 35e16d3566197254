"""The pattern matcher, on graphs of a few nodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from lfmc.graph.program import Program
from lfmc.passes.pattern import ANY, OneOf, Op, Var, arguments, match_pattern
from tests.passes.graphs import program_of, random


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def graph_of(function: Callable[..., Tensor]) -> Program:
    return program_of(Function(function), random(2, 4), random(2, 4, seed=1))


def result(program: Program) -> fx.Node:
    output = next(n for n in program.graph.nodes if n.op == "output")
    node = output.args[0][0]
    assert isinstance(node, fx.Node)
    return node


def inputs(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "placeholder"]


def test_a_call_matches_with_its_inputs() -> None:
    program = graph_of(lambda x, y: torch.sub(x, torch.relu(y)))
    x, y = inputs(program)
    match = match_pattern(Op("aten.sub", Var("a"), Op("aten.relu", Var("b"))), result(program))
    assert match
    assert (match["a"], match["b"]) == (x, y)
    assert [n.name for n in match.nodes] == ["sub", "relu"]


@pytest.mark.parametrize(
    "pattern",
    [
        Op("aten.add", Var("a"), Var("b")),
        Op("aten.sub", Op("aten.relu", ANY), ANY),
        Op("aten.sub", ANY),
        Op("aten.sub", ANY, ANY, ANY, ANY),
    ],
)
def test_other_calls_do_not_match(pattern: Op) -> None:
    assert (
        match_pattern(pattern, result(graph_of(lambda x, y: torch.sub(x, torch.relu(y))))) is None
    )


def test_the_same_variable_is_the_same_value() -> None:
    square = Op("aten.mul", Var("x"), Var("x"))
    assert match_pattern(square, result(graph_of(lambda x, y: x * x)))
    assert match_pattern(square, result(graph_of(lambda x, y: x * y))) is None


def test_products_and_sums_match_in_either_order() -> None:
    pattern = Op("aten.mul", Op("aten.relu", Var("a")), Var("b"))
    for function in (lambda x, y: torch.relu(x) * y, lambda x, y: y * torch.relu(x)):
        program = graph_of(function)
        match = match_pattern(pattern, result(program))
        assert match
        assert [match["a"], match["b"]] == inputs(program)


def test_differences_match_in_one_order() -> None:
    pattern = Op("aten.sub", Op("aten.relu", Var("a")), Var("b"))
    assert match_pattern(pattern, result(graph_of(lambda x, y: torch.relu(x) - y)))
    assert match_pattern(pattern, result(graph_of(lambda x, y: y - torch.relu(x)))) is None


def test_a_failed_order_leaves_no_bindings() -> None:
    # x is bound as "a" by the first order, which fails at its second argument
    pattern = Op("aten.mul", Var("a"), Op("aten.relu", Var("a")))
    program = graph_of(lambda x, y: torch.relu(x) * x)
    match = match_pattern(pattern, result(program))
    assert match
    assert match["a"] is inputs(program)[0]
    assert len(match.nodes) == 2


def test_arguments_left_out_have_their_defaults() -> None:
    unscaled, scaled = graph_of(lambda x, y: x + y), graph_of(lambda x, y: torch.add(x, y, alpha=2))
    assert match_pattern(Op("aten.add", ANY, ANY), result(unscaled))
    assert match_pattern(Op("aten.add", ANY, ANY), result(scaled)) is None
    assert arguments(result(scaled))[2] == 2
    assert arguments(result(unscaled))[2] == 1


def test_the_device_of_a_tensor_does_not_matter() -> None:
    program = graph_of(lambda x, y: x + torch.zeros_like(y, device="cpu"))
    assert match_pattern(Op("aten.add", ANY, Op("aten.zeros_like", ANY)), result(program))


def test_one_of_takes_the_first_that_matches() -> None:
    pattern = OneOf(Op("aten.relu", Var("x")), Op("aten.neg", Var("x")), Var("y"))
    program = graph_of(lambda x, y: -x)
    match = match_pattern(pattern, result(program))
    assert match
    assert match["x"] is inputs(program)[0]
    assert match_pattern(OneOf(Op("aten.relu", ANY)), result(program)) is None


def test_numbers_match_by_type_and_value() -> None:
    node = result(graph_of(lambda x, y: x.transpose(0, 1)))
    assert match_pattern(Op("aten.transpose", ANY, 0, 1), node)
    assert match_pattern(Op("aten.transpose", ANY, 0.0, 1.0), node) is None
    assert match_pattern(Op("aten.transpose", ANY, 1, 0), node) is None


def test_lists_match_item_by_item() -> None:
    program = graph_of(lambda x, y: torch.cat([x, torch.relu(y)], 1))
    match = match_pattern(Op("aten.cat", [Var("a"), Op("aten.relu", Var("b"))], 1), result(program))
    assert match
    assert [match["a"], match["b"]] == inputs(program)
    assert match_pattern(Op("aten.cat", [ANY], 1), result(program)) is None


def test_bind_names_the_call_itself() -> None:
    program = graph_of(lambda x, y: torch.relu(x) + y)
    match = match_pattern(Op("aten.add", Op("aten.relu", ANY, bind="inner"), ANY), result(program))
    assert match
    assert match.node("inner").name == "relu"


def test_node_raises_for_a_variable_that_is_no_node() -> None:
    match = match_pattern(Op("aten.add", Var("x"), Var("c")), result(graph_of(lambda x, y: x + 3)))
    assert match
    assert match["c"] == 3
    with pytest.raises(TypeError, match="'c'"):
        match.node("c")


def test_a_match_is_private_unless_an_inner_node_has_other_users() -> None:
    pattern = Op("aten.mul", Op("aten.relu", Var("x"), bind="inner"), Var("y"))
    private = match_pattern(pattern, result(graph_of(lambda x, y: torch.relu(x) * y)))
    assert private
    assert private.is_private()

    def product_and_relu(x: Tensor, y: Tensor) -> Tensor:
        positive = torch.relu(x)
        return torch.sub(positive * y, positive)

    product = next(graph_of(product_and_relu).nodes("aten.mul"))
    shared = match_pattern(pattern, product)
    assert shared
    assert not shared.is_private()
    assert shared.is_private("inner")
