"""fuse-attention: from the outputs of the projections to the output and the new caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfmc.graph.program import Program
from lfmc.model.attention import CACHE_WRITES, attend, attention_mask, write_cache
from lfmc.model.norm import RmsNorm
from lfmc.model.rope import rotate, rotation
from lfmc.passes.base import apply
from lfmc.passes.fuse_attention import FuseAttention
from lfmc.passes.fuse_rms_norm import FuseRmsNorm
from tests.passes.graphs import count_rewrites, program_of, random, weight

HEADS, KV_HEADS, D, T, C = 4, 2, 8, 3, 6
INPUTS = (
    random(2, T, HEADS * D),
    random(2, T, KV_HEADS * D, seed=1),
    random(2, T, KV_HEADS * D, seed=2),
    torch.tensor([1, 2, 3]),
    random(2, KV_HEADS, C, D, seed=3),
    random(2, KV_HEADS, C, D, seed=4),
)


class Attend(nn.Module):
    """The decoder's attention between its projections; each subclass changes one detail."""

    def __init__(
        self, cache_write: str = "index_copy", window: int | None = None, eps: float = 1e-5
    ):
        super().__init__()
        self.q_norm, self.k_norm = RmsNorm(D, 1e-5), RmsNorm(D, eps)
        self.q_norm.weight, self.k_norm.weight = weight(D), weight(D, seed=2)
        self.inv_freq = nn.Buffer(torch.tensor([1.0, 0.1, 0.01, 0.0]))
        self.cache_write, self.window = cache_write, window

    def positions_of_keys(self, positions: Tensor) -> Tensor:
        return positions

    def mask(self, positions: Tensor) -> Tensor:
        return attention_mask(positions, C, self.window)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return attend(q, keys, values, mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *caches: Tensor) -> Any:
        query_rotation = rotation(positions, self.inv_freq)
        key_rotation = rotation(self.positions_of_keys(positions), self.inv_freq)
        q = rotate(self.q_norm(q.unflatten(-1, (HEADS, -1))).transpose(1, 2), *query_rotation)
        k = rotate(self.k_norm(k.unflatten(-1, (KV_HEADS, -1))).transpose(1, 2), *key_rotation)
        v = v.unflatten(-1, (KV_HEADS, -1)).transpose(1, 2)
        keys = write_cache(caches[0], k, positions, self.cache_write)
        values = write_cache(caches[1], v, positions, self.cache_write)
        return self.attend(q, keys, values, self.mask(positions)), keys, values


def traced(module: nn.Module) -> Program:
    program = program_of(module, *INPUTS, clean=True)
    apply([FuseRmsNorm()], program)
    return program


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cache_write", CACHE_WRITES)
def test_fires(cache_write: str, window: int | None, golden: Callable[[str, str], None]) -> None:
    program = traced(Attend(cache_write, window))
    before = program.text()
    assert count_rewrites(FuseAttention(), program, *INPUTS) == 1
    (fused,) = program.nodes("lfm.attention")
    assert fused.args[-3:] == (1e-5, window or 0, cache_write)
    assert not program.count("aten.softmax")
    assert not program.count("lfm.rms_norm")
    if cache_write == "scatter" and window:
        golden("fuse_attention", f"{before}\n--\n{program.text()}")


class OtherScale(Attend):
    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return attend(q * 1.5, keys, values, mask)


class OtherScoreScale(Attend):
    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        groups = q.unflatten(1, (KV_HEADS, HEADS // KV_HEADS))
        scores = (groups @ keys.unsqueeze(2).transpose(3, 4)) * 0.25
        shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (shares @ values.unsqueeze(2)).flatten(1, 2).transpose(1, 2)


class CappedValues(Attend):
    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return attend(q, keys, values.tanh(), mask)


class SeesTheFuture(Attend):
    def mask(self, positions: Tensor) -> Tensor:
        return torch.arange(C).unsqueeze(0) <= positions.unsqueeze(1) + 1


class SeesOnlyThePast(Attend):
    def mask(self, positions: Tensor) -> Tensor:
        return torch.arange(C).unsqueeze(0) < positions.unsqueeze(1)


class KeysRotatedFurther(Attend):
    def positions_of_keys(self, positions: Tensor) -> Tensor:
        return positions + 1


@pytest.mark.parametrize(
    "module",
    [
        OtherScale(),
        OtherScoreScale(),
        CappedValues(),
        SeesTheFuture(),
        SeesOnlyThePast(),
        KeysRotatedFurther(),
        Attend(eps=1e-6),
    ],
    ids=lambda module: type(module).__name__,
)
def test_must_not_fire(module: nn.Module) -> None:
    program = traced(module)
    text = program.text()
    assert count_rewrites(FuseAttention(), program, *INPUTS) == 0
    assert program.text() == text
