"""remove-no-ops: its five rules, and similar operators that change the result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lfmc.passes.remove_no_ops import RemoveNoOps
from tests.passes.graphs import count_rewrites, program_of, random


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(torch.relu(x)) + 1


NO_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x.to(torch.float32),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "slice": lambda x: x[:, 0:],
    "mul": lambda x: x * 1.0,
}
REAL: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x.to(torch.float64),
    "slice-from-one": lambda x: x[:, 1:],
    "slice-to-three": lambda x: x[:, :3],
    "slice-by-two": lambda x: x[:, ::2],
    "mul": lambda x: x * 0.5,
    "mul-of-whole-numbers": lambda x: x.long() * 1.0,
}


@pytest.mark.parametrize("name", NO_OPS)
def test_fires(name: str) -> None:
    program = program_of(Apply(NO_OPS[name]), random(2, 4))
    assert count_rewrites(RemoveNoOps(), program, random(2, 4)) >= 1
    calls = [n.name for n in program.graph.nodes if n.op == "call_function"]
    assert calls == ["relu", *(["transpose"] if name == "contiguous" else []), "add"]


@pytest.mark.parametrize("name", REAL)
def test_must_not_fire(name: str) -> None:
    program = program_of(Apply(REAL[name]), random(2, 4))
    names = [n.name for n in program.graph.nodes if "assert" not in n.name]
    count_rewrites(RemoveNoOps(), program, random(2, 4))
    assert [n.name for n in program.graph.nodes] == names


def test_golden(golden: Callable[[str, str], None]) -> None:
    def all_rules(x: Tensor) -> Tensor:
        return (x[:, 0:].clone() * 1.0).to(torch.float32).contiguous()[:, 1:]

    program = program_of(Apply(all_rules), random(2, 4))
    before = program.text()
    count_rewrites(RemoveNoOps(), program, random(2, 4))
    golden("remove_no_ops", f"{before}\n--\n{program.text()}")
