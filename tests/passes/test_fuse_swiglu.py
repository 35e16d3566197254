"""fuse-swiglu: graphs in which the pass fires, and graphs in which it must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.passes.fuse_swiglu import FuseSwiglu
from tests.passes.graphs import count_rewrites, program_of, random


class Apply(nn.Module):
    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return self.function(x, y)


INPUTS = random(2, 4), random(2, 4, seed=1)


def shared(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    gate = F.silu(x)
    return gate * y, gate


NOT_SWIGLU: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "another-activation": lambda x, y: (F.gelu(x) * y,),
    "times-a-number": lambda x, y: (F.silu(x) * 2.0,),
    "broadcast": lambda x, y: (F.silu(x) * y[:1],),
    "shared-gate": shared,
}


@pytest.mark.parametrize("order", [lambda x, y: (F.silu(x) * y,), lambda x, y: (y * F.silu(x),)])
def test_fires(order: Callable[..., tuple[Tensor, ...]]) -> None:
    program = program_of(Apply(order), *INPUTS)
    assert count_rewrites(FuseSwiglu(), program, *INPUTS) == 1
    x, y = (n for n in program.graph.nodes if n.op == "placeholder")
    assert next(program.nodes("lfm.swiglu")).args == (x, y)


@pytest.mark.parametrize("name", NOT_SWIGLU)
def test_must_not_fire(name: str) -> None:
    program = program_of(Apply(NOT_SWIGLU[name]), *INPUTS)
    text = program.text()
    assert count_rewrites(FuseSwiglu(), program, *INPUTS) == 0
    assert program.text() == text


def test_golden(golden: Callable[[str, str], None]) -> None:
    program = program_of(Apply(lambda x, y: (torch.relu(F.silu(x) * y),)), *INPUTS)
    before = program.text()
    count_rewrites(FuseSwiglu(), program, *INPUTS)
    golden("fuse_swiglu", f"{before}\n--\n{program.text()}")
