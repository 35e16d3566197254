"""fuse-rms-norm: the norm, and the residual sum before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lfmc.passes.fuse_rms_norm import FuseRmsNorm
from tests.passes.graphs import count_rewrites, program_of, random, weight


class Norm(nn.Module):
    """RMS norm of x; subclasses change the formula or the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = weight(4)

    def norm(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(x),)


class Residual(Norm):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total = x + torch.relu(x)
        return self.norm(total), total


class TwoNormsOfOneSum(Norm):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total = x + torch.relu(x)
        return self.norm(total), self.norm(total)


class BroadcastSum(Norm):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(x + self.weight),)


class ScaledSum(Norm):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(torch.add(x, torch.relu(x), alpha=2)),)


def rewrites_and_operators(module: nn.Module) -> tuple[int, list[str]]:
    program = program_of(module, random(2, 3, 4), clean=True)
    fired = count_rewrites(FuseRmsNorm(), program, random(2, 3, 4))
    return fired, [n.name.removesuffix("_default") for n in program.graph.nodes]


def test_fires(golden: Callable[[str, str], None]) -> None:
    program = program_of(Norm(), random(2, 3, 4), clean=True)
    before = program.text()
    assert count_rewrites(FuseRmsNorm(), program, random(2, 3, 4)) == 1
    golden("fuse_rms_norm", f"{before}\n--\n{program.text()}")


def test_fires_with_the_residual_sum(golden: Callable[[str, str], None]) -> None:
    program = program_of(Residual(), random(2, 3, 4), clean=True)
    before = program.text()
    assert count_rewrites(FuseRmsNorm(), program, random(2, 3, 4)) == 1
    assert program.count("lfm.add_rms_norm") == 1
    assert program.count("aten.add") == 0
    golden("fuse_rms_norm_residual", f"{before}\n--\n{program.text()}")


@pytest.mark.parametrize("module", [TwoNormsOfOneSum, BroadcastSum, ScaledSum])
def test_a_sum_that_belongs_to_no_norm_stays(module: type[Norm]) -> None:
    fired, operators = rewrites_and_operators(module())
    assert fired == (2 if module is TwoNormsOfOneSum else 1)
    assert "add" in operators
    assert "add_rms_norm" not in operators


class EpsOutside(Norm):
    def norm(self, x: Tensor) -> Tensor:
        return self.weight * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-5))


class EpsIsATensor(Norm):
    def norm(self, x: Tensor) -> Tensor:
        eps = self.weight.pow(2).sum()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class OtherDim(Norm):
    def norm(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5))


class OtherPower(Norm):
    def norm(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5))


class OtherMean(Norm):
    def norm(self, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        return self.weight * (x * torch.rsqrt(positive.pow(2).mean(-1, keepdim=True) + 1e-5))


class WeightPerToken(Norm):
    def norm(self, x: Tensor) -> Tensor:
        return torch.relu(x) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Shared(Norm):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * (x * inverse), inverse


@pytest.mark.parametrize(
    "module",
    [EpsOutside, EpsIsATensor, OtherDim, OtherPower, OtherMean, WeightPerToken, Shared],
)
def test_must_not_fire(module: type[Norm]) -> None:
    fired, operators = rewrites_and_operators(module())
    assert fired == 0
    assert "rms_norm" not in operators
