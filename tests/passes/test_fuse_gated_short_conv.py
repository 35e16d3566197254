"""fuse-gated-short-conv: on small graphs, and on the models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from lfmc.passes.fuse_gated_short_conv import FuseGatedShortConv
from tests.factories import reference_model
from tests.passes.graphs import count_rewrites, program_of, random, weight

H, TAPS, T = 4, 3, 5
BCX, STATE = random(2, T, 3 * H), random(2, H, TAPS - 1, seed=2)


class Stateful(nn.Module):
    """The block of lfmc's decoder; each option changes one detail."""

    def __init__(self, bias: bool = False, groups: int = H, last: Any = None) -> None:
        super().__init__()
        self.weight = weight(H, H // groups, TAPS)
        self.bias = weight(H) if bias else None
        self.groups = groups
        self.last = last or slice(1 - TAPS, None)

    def forward(self, bcx: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        gate, out_gate, value = bcx.transpose(1, 2).chunk(3, dim=1)
        inputs = torch.cat([state, gate * value], dim=2)
        mixed = F.conv1d(inputs, self.weight, self.bias, groups=self.groups)
        return (out_gate * mixed).transpose(1, 2), inputs[:, :, self.last]


class OneShot(nn.Module):
    """The block of transformers, without a state; each option changes one detail."""

    def __init__(self, padding: int = TAPS - 1, length: int = T, dilation: int = 1) -> None:
        super().__init__()
        self.weight = weight(H, 1, TAPS)
        self.options = {"padding": padding, "dilation": dilation, "groups": H}
        self.length = length

    def forward(self, bcx: Tensor) -> tuple[Tensor, ...]:
        gate, out_gate, value = bcx.transpose(-1, -2).chunk(3, dim=-2)
        mixed = F.conv1d(gate * value, self.weight, **self.options)
        return ((out_gate * mixed[:, :, : self.length]).transpose(-1, -2),)


class SharedProduct(Stateful):
    """B * x is also an output, so the pass must keep it."""

    def forward(self, bcx: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        gate, _, value = bcx.transpose(1, 2).chunk(3, dim=1)
        return *super().forward(bcx, state), gate * value


class NoNewState(Stateful):
    def forward(self, bcx: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        gate, out_gate, value = bcx.transpose(1, 2).chunk(3, dim=1)
        mixed = F.conv1d(torch.cat([state, gate * value], dim=2), self.weight, groups=H)
        return ((out_gate * mixed).transpose(1, 2),)


class OtherOrder(Stateful):
    """The input is C, B, x: not a gated short convolution."""

    def forward(self, bcx: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        out_gate, gate, value = bcx.transpose(1, 2).chunk(3, dim=1)
        inputs = torch.cat([state, gate * value], dim=2)
        mixed = F.conv1d(inputs, self.weight, None, groups=H)
        return (out_gate * mixed).transpose(1, 2), inputs[:, :, 1 - TAPS :]


@pytest.mark.parametrize("bias", [False, True])
def test_fires_with_a_state(golden: Callable[[str, str], None], bias: bool) -> None:
    program = program_of(Stateful(bias), BCX, STATE, clean=True)
    before = program.text()
    assert count_rewrites(FuseGatedShortConv(), program, BCX, STATE) == 1
    assert program.count("aten.conv1d") == 0
    if not bias:
        golden("fuse_gated_short_conv", f"{before}\n--\n{program.text()}")


def test_fires_without_a_state(golden: Callable[[str, str], None]) -> None:
    program = program_of(OneShot(), BCX, clean=True)
    before = program.text()
    assert count_rewrites(FuseGatedShortConv(), program, BCX) == 1
    golden("fuse_gated_short_conv_one_shot", f"{before}\n--\n{program.text()}")


def test_an_inner_result_with_other_users_stays() -> None:
    program = program_of(SharedProduct(), BCX, STATE, clean=True)
    assert count_rewrites(FuseGatedShortConv(), program, BCX, STATE) == 1
    assert program.count("aten.mul") == 1


@pytest.mark.parametrize(
    "module",
    [
        Stateful(groups=1),
        Stateful(groups=2),
        Stateful(last=slice(-1, None)),
        Stateful(last=slice(1 - TAPS, -1)),
        NoNewState(),
        OtherOrder(),
    ],
    ids=["dense", "grouped", "short-state", "cut-state", "no-new-state", "other-order"],
)
def test_must_not_fire_with_a_state(module: nn.Module) -> None:
    program = program_of(module, BCX, STATE, clean=True)
    text = program.text()
    assert count_rewrites(FuseGatedShortConv(), program, BCX, STATE) == 0
    assert program.text() == text


@pytest.mark.parametrize(
    "module",
    [OneShot(padding=1), OneShot(padding=3), OneShot(length=1), OneShot(padding=4, dilation=2)],
    ids=["future-inputs", "delayed", "cut-to-one", "dilated"],
)
def test_must_not_fire_without_a_state(module: nn.Module) -> None:
    program = program_of(module, BCX, clean=True)
    text = program.text()
    assert count_rewrites(FuseGatedShortConv(), program, BCX) == 0
    assert program.text() == text


class LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["lfm2", "lfm3"])
def test_fires_on_every_convolution_of_the_transformers_model(
    tiny_checkpoint: Callable[..., Path], kind: str, dynamic: bool
) -> None:
    model = reference_model(tiny_checkpoint(kind, vocab_size=48))
    tokens = torch.arange(20).view(2, 10) + 3
    options = {"dynamic_shapes": {"tokens": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}} if dynamic else {}
    program = program_of(LogitsOnly(model), tokens, clean=True, **options)
    layers = model.config.layer_types.count("conv")
    assert program.count("aten.conv1d") == layers == 2
    assert count_rewrites(FuseGatedShortConv(), program, tokens) == layers
    assert program.count("lfm.gated_short_conv") == layers
    assert program.count("aten.conv1d") == 0
