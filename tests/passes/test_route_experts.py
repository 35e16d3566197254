"""route-experts: graphs in which the pass fires, and graphs in which it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.graph.program import Program
from lfmc.model import Moe, read_config
from lfmc.model.experts import SparseMoe
from lfmc.passes.base import apply
from lfmc.passes.fuse_swiglu import FuseSwiglu
from lfmc.passes.remove_dead_code import RemoveDeadCode
from lfmc.passes.route_experts import RouteExperts
from tests.factories import KINDS
from tests.passes.graphs import count_rewrites, program_of, random

H, E, K, INNER = 8, 4, 2, 6
X = random(1, 5, H)


class Experts(SparseMoe):
    """The block of the decoder; each subclass changes one detail."""

    def __init__(self, normalize: bool = True, use_bias: bool = True, scale: float = 1.0) -> None:
        config = read_config({**KINDS["lfm2_moe"], "hidden_size": H})
        super().__init__(config, Moe(E, K, INNER, 0, normalize, use_bias, scale))
        for seed, tensor in enumerate([*self.parameters(), *self.buffers()]):
            tensor.data.copy_(0.5 * random(*tensor.shape, seed=seed))

    def initial_shares(self, flat: Tensor) -> Tensor:
        return flat.new_zeros(flat.shape[0], E)

    def term(self, index: int, flat: Tensor, shares: Tensor) -> Tensor:
        return self.experts[index](flat) * shares[:, index : index + 1]

    def initial_sum(self, flat: Tensor) -> Tensor:
        return torch.zeros_like(flat)

    def forward(self, x: Tensor) -> Any:
        flat = x.flatten(0, 1)
        expert_ids, weights = self.route(flat)
        shares = self.initial_shares(flat).scatter(1, expert_ids, weights)
        y = self.initial_sum(flat)
        for index in range(E):
            y = y + self.term(index, flat, shares)
        return (y.view_as(x),)


def traced(module: nn.Module) -> Program:
    program = program_of(module, X, clean=True)
    apply([FuseSwiglu()], program)
    return program


@pytest.mark.parametrize(
    ("normalize", "use_bias", "scale"),
    [(True, True, 1.0), (False, True, 1.0), (True, False, 1.0), (True, True, 2.5)],
)
def test_fires(normalize: bool, use_bias: bool, scale: float) -> None:
    program = traced(Experts(normalize, use_bias, scale))
    assert count_rewrites(RouteExperts(), program, X) == 1
    (fused,) = program.nodes("lfm.moe")
    assert fused.args[-3:] == (K, normalize, scale)
    for position, leaf in ((3, "w1"), (4, "w3"), (5, "w2")):
        targets = [node.target for node in fused.args[position]]
        assert targets == [f"experts.{i}.{leaf}.weight" for i in range(E)]
    assert not program.count("lfm.swiglu")
    apply([RemoveDeadCode()], program)
    assert not program.count("aten.topk")


def test_fires_on_the_block_of_the_decoder(golden: Callable[[str, str], None]) -> None:
    class DecoderExperts(Experts):
        forward = SparseMoe.forward

    program = traced(DecoderExperts())
    assert count_rewrites(RouteExperts(), program, X) == 1
    golden("route_experts", program.text())


class LacksAnExpert(Experts):
    def term(self, index: int, flat: Tensor, shares: Tensor) -> Tensor:
        return super().term(index or 1, flat, shares)


class OtherInput(Experts):
    def term(self, index: int, flat: Tensor, shares: Tensor) -> Tensor:
        return super().term(index, flat.relu() if index == 2 else flat, shares)


class WideShare(Experts):
    def term(self, index: int, flat: Tensor, shares: Tensor) -> Tensor:
        share = shares[:, :2].sum(1, keepdim=True) if index == 0 else shares[:, index : index + 1]
        return self.experts[index](flat) * share


class SharedExpert(Experts):
    def initial_sum(self, flat: Tensor) -> Tensor:
        return flat


class SharesStartAtOne(Experts):
    def initial_shares(self, flat: Tensor) -> Tensor:
        return flat.new_ones(flat.shape[0], E)


class LargerEps(Experts):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(F.linear(x, self.gate.weight))
        _, expert_ids = torch.topk(scores + self.expert_bias, K, dim=-1)
        weights = scores.gather(1, expert_ids)
        return expert_ids, weights / (weights.sum(-1, keepdim=True) + 1e-2)


class Smallest(Experts):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(F.linear(x, self.gate.weight))
        _, expert_ids = torch.topk(scores, K, dim=-1, largest=False)
        return expert_ids, scores.gather(1, expert_ids)


class LearnedScale(Experts):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        expert_ids, weights = super().route(x)
        return expert_ids, weights * self.expert_bias.sum()


class PartialSumUsedElsewhere(Experts):
    def forward(self, x: Tensor) -> Any:
        flat = x.flatten(0, 1)
        shares = self.initial_shares(flat).scatter(1, *self.route(flat))
        first = self.initial_sum(flat) + self.term(0, flat, shares)
        y = first
        for index in range(1, E):
            y = y + self.term(index, flat, shares)
        return y, first


@pytest.mark.parametrize(
    "module",
    [
        LacksAnExpert(),
        OtherInput(),
        WideShare(),
        SharedExpert(),
        SharesStartAtOne(),
        LargerEps(),
        Smallest(),
        LearnedScale(use_bias=True, normalize=False),
        PartialSumUsedElsewhere(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_must_not_fire(module: nn.Module) -> None:
    program = traced(module)
    text = program.text()
    assert count_rewrites(RouteExperts(), program, X) == 0
    assert program.text() == text
