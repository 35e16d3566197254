"""The fused program in torch, activations of n-bit products rounded as a runtime rounds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lfmc.model.experts import choose_experts, mix_experts

Round = Callable[[Tensor, int], Tensor]


def round_groups(x: Tensor, group: int) -> Tensor:
    """`x` `[..., K]` after symmetric int8 rounding of every `group` values of a row."""
    codes, step = group_codes(x, group)
    rounded: Tensor = (torch.round(codes) * step).flatten(-2)
    return rounded[..., : x.shape[-1]]


def group_codes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes before they are rounded, `[..., groups, group]`, and the step of each group."""
    groups: Tensor = F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    peak = groups.abs().amax(-1, keepdim=True)
    return groups * torch.where(peak > 0, 127.0 / peak, 0.0), peak / 127.0


class RoundedActivations(nn.Module):
    """A bound program whose n-bit products get rounded inputs, experts' too; `round` is given the
    input and how many columns share a scale of the weight."""

    def __init__(self, program: fx.GraphModule, round: Round) -> None:
        super().__init__()
        self.program, self._round = program, round

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _Interpreter(self.program, self._round).run(*inputs)  # type: ignore[no-any-return]


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, round: Round) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._round = round
        self._groups: dict[int, int] = {}  # by ids of dequantized matrices

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
        chosen, weights = choose_experts(scores, choice, top_k, normalize, scale)
        shares = torch.zeros_like(scores).scatter(1, chosen, weights)
        return mix_experts(x, shares, w1, w3, w2, self._product)
