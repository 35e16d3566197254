"""Run the fused program in torch, with activations of n-bit products rounded as in a runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lfmc.model.experts import choose_experts, mix_experts

Round = Callable[[Tensor, int], Tensor]


def round_groups(x: Tensor, group: int) -> Tensor:
    """Round each `group` values of the rows of `x` `[..., K]` to symmetric int8, and dequantize."""
    codes, step = group_codes(x, group)
    rounded: Tensor = (torch.round(codes) * step).flatten(-2)
    return rounded[..., : x.shape[-1]]


def group_codes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the unrounded codes `[..., groups, group]` of `x` and the step of each group."""
    groups: Tensor = F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    peak = groups.abs().amax(-1, keepdim=True)
    return groups * torch.where(peak > 0, 127.0 / peak, 0.0), peak / 127.0


class RoundedActivations(nn.Module):
    """A bound program that rounds the inputs of n-bit products, including those of experts.

    `round(x, group)` rounds an input; `group` columns of the weight share a scale.
    """

    def __init__(self, program: fx.GraphModule, round: Round) -> None:
        super().__init__()
        self.program, self._round = program, round

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _Interpreter(self.program, self._round).run(*inputs)  # type: ignore[no-any-return]


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, round: Round) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._round = round
        self._groups: dict[int, int] = {}  # group size by `id` of the dequantized matrix

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ops = torch.ops.lfm
        if target is ops.linear_nbits.default:
            args = (self._round(args[0], args[6]), *args[1:])
        if target is ops.moe.default:
            return self._moe(*args)
        result = super().call_function(target, args, kwargs)
        if target is ops.dequantize.default:
            self._groups[id(result)] = args[4]
        return result

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        group = self._groups.get(id(weight))
        return F.linear(x if group is None else self._round(x, group), weight)

    def _moe(
        self,
        x: Tensor,
        scores: Tensor,
        choice: Tensor,
        w1: list[Tensor],
        w3: list[Tensor],
        w2: list[Tensor],
        top_k: int,
        normalize: bool,
        scale: float,
    ) -> Tensor:
        experts, weights = choose_experts(scores, choice, top_k, normalize, scale)
        shares = torch.zeros_like(scores).scatter(1, experts, weights)
        return mix_experts(x, shares, w1, w3, w2, self._product)
