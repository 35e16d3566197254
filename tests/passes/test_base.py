"""Running passes, and the errors for a pass that breaks the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lfmc.errors import InputError
from lfmc.graph.program import Program
from lfmc.passes.base import Applied, PassError, apply
from lfmc.passes.pipeline import fusion, pipeline
from lfmc.passes.remove_no_ops import RemoveNoOps
from tests.passes.graphs import program_of


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(-x)


@dataclass(frozen=True)
class Step:
    """A pass that runs the `action` of a test."""

    action: Any
    name: ClassVar[str] = "step"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ("aten.neg",)

    def run(self, program: Program) -> int:
        self.action(program)
        return 1


def remove_neg(program: Program) -> None:
    node = next(program.nodes("aten.neg"))
    program.replace(node, node.all_input_nodes[0])


@pytest.fixture
def program() -> Program:
    return program_of(Negated(), torch.ones(2))


def test_apply_returns_a_record_of_the_passes(program: Program) -> None:
    assert apply([RemoveNoOps(), Step(remove_neg)], program) == [
        Applied("remove-no-ops", 0),
        Applied("step", 1),
    ]
    assert torch.equal(program.module(torch.tensor([1.0, -1.0]))[0], torch.tensor([1.0, 0.0]))


def test_an_operator_that_a_pass_should_remove_is_an_error(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        apply([RemoveNoOps(), Step(lambda program: None)], program)
    message = str(caught.value)
    assert "'step'" in message
    assert "after: remove-no-ops (0)" in message
    assert "aten.neg x1" in message
    assert caught.value.exit_code == 1


def fail(program: Program) -> None:
    raise KeyError("no such weight")


def use_before_definition(program: Program) -> None:
    neg, relu = next(program.nodes("aten.neg")), next(program.nodes("aten.relu"))
    remove_neg(program)
    del neg
    x = next(n for n in program.graph.nodes if n.op == "placeholder")
    with program.graph.inserting_before(x):
        relu.args = (program.graph.call_function(torch.ops.aten.neg.default, (relu,)),)


@pytest.mark.parametrize("action", [fail, use_before_definition])
def test_a_broken_pass_is_an_error(program: Program, action: Any) -> None:
    with pytest.raises(PassError) as caught:
        apply([RemoveNoOps(), Step(action)], program)
    assert "'step' failed" in str(caught.value)
    assert "after: remove-no-ops (0)" in str(caught.value)


def test_an_error_of_the_first_pass_names_no_earlier_pass(program: Program) -> None:
    with pytest.raises(PassError, match="failed") as caught:
        apply([Step(fail)], program)
    assert "after: none" in str(caught.value)


def test_an_input_error_of_a_pass_is_raised_unchanged(program: Program) -> None:
    def refuse(program: Program) -> None:
        raise InputError("the plan is wrong")

    with pytest.raises(InputError, match="the plan is wrong"):
        apply([Step(refuse)], program)


def test_names_are_unique_and_merging_can_be_disabled() -> None:
    names = [step.name for step in pipeline({})]
    assert len(set(names)) == len(names)
    assert names[: len(fusion())] == [step.name for step in fusion()]
    assert [n for n in names if n not in {s.name for s in pipeline({}, merge=False)}] == [
        "merge-projections"
    ]
