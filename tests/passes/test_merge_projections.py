"""merge-projections: graphs in which the pass fires, and graphs in which it must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lfmc.graph.program import Weight
from lfmc.passes.merge_projections import MergeProjections
from tests.passes.graphs import count_rewrites, program_of, random

X = random(2, 3, 8)
POSITIONS = torch.arange(3)
CACHES = random(2, 1, 4, 4), random(2, 1, 4, 4)


class Mlp(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.w1, self.mlp.w3 = nn.Linear(8, 6, bias=bias), nn.Linear(8, 6, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.lfm.swiglu(self.mlp.w1(x), self.mlp.w3(x)),)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)
        self.k_proj, self.v_proj = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, positions: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        inv_freq = self.gain[:2]
        norms = (self.gain, self.gain, inv_freq)
        return torch.ops.lfm.attention(  # type: ignore[no-any-return]
            q, k, v, *norms, positions, *caches, 1e-5, 0, "scatter"
        )


class TwoInputs(Mlp):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.lfm.swiglu(self.mlp.w1(x), self.mlp.w3(x.relu())),)


class SharedGate(Mlp):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gate = self.mlp.w1(x)
        return torch.ops.lfm.swiglu(gate, self.mlp.w3(x)), gate


class ComputedWeight(Mlp):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gate = nn.functional.linear(x, self.mlp.w1.weight * 2)
        return (torch.ops.lfm.swiglu(gate, self.mlp.w3(x)),)


class NotALinear(Mlp):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.lfm.swiglu(self.mlp.w1(x).relu(), self.mlp.w3(x)),)


class OtherOperator(Mlp):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.mlp.w1(x) + self.mlp.w3(x),)


class SameProjection(Mlp):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gate = self.mlp.w1(x)
        return (torch.ops.lfm.swiglu(gate, gate),)


def test_fires_on_a_feed_forward(golden: Callable[[str, str], None]) -> None:
    program = program_of(Mlp(), X, clean=True)
    before = program.text()
    assert count_rewrites(MergeProjections(), program, X) == 1
    merged = program.weights["mlp.w1+w3.weight"]
    assert merged == Weight(("mlp.w1.weight", "mlp.w3.weight"))
    assert program.count("aten.linear") == 1
    golden("merge_projections", f"{before}\n--\n{program.text()}")


def test_fires_on_attention() -> None:
    inputs = (X, POSITIONS, *CACHES)
    program = program_of(Attention(), *inputs, clean=True)
    assert count_rewrites(MergeProjections(), program, *inputs) == 1
    assert program.count("aten.linear") == 1
    sources = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    assert Weight(sources) in program.weights.values()


@pytest.mark.parametrize(
    "module",
    [
        Mlp(bias=True),
        TwoInputs(),
        SharedGate(),
        ComputedWeight(),
        NotALinear(),
        OtherOperator(),
        SameProjection(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_must_not_fire(module: nn.Module) -> None:
    program = program_of(module, X, clean=True)
    text = program.text()
    assert count_rewrites(MergeProjections(), program, X) == 0
    assert program.text() == text
