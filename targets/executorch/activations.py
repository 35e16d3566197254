"""The fused program in torch with activations rounded as XNNPACK's dynamic kernels round them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lfmc.model.experts import choose_experts, mix_experts


def round_rows(x: Tensor) -> Tensor:
    """Every row of `[..., K]` on 256 steps from its least to its greatest value, 0 among them.

    In the order of XNNPACK's own arithmetic (`xnn_f32_qd8_asymmetric_quantization_params`), so that
    few values fall on the other side of a rounding.
    """
    least = x.amin(-1, keepdim=True).clamp(max=0)
    most = x.amax(-1, keepdim=True).clamp(min=0)
    steps = torch.where(least == most, 1.0, 255 / (most - least))  # in 1
    low, high = -128 - least * steps, 127 - most * steps
    zero = torch.where(least * steps + most * steps > 1, low, high).round().clamp(-128, 127)
    codes = (x * steps).round().add(zero).clamp(-128, 127)
    return (codes - zero) * (1 / steps)


class RoundedActivations(nn.Module):
    """A bound program whose n-bit products get rounded inputs, experts' too."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__()
        self.program = program

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _Interpreter(self.program).run(*inputs)  # type: ignore[no-any-return]


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.n_bit: set[int] = set()  # ids of dequantized matrices

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ops = torch.ops.lfm
        if target is ops.linear_nbits.default:
            args = (round_rows(args[0]), *args[1:])
        if target is ops.moe.default:
            return self._moe(*args)
        result = super().call_function(target, args, kwargs)
        if target is ops.dequantize.default:
            self.n_bit.add(id(result))
        return result

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(round_rows(x) if id(weight) in self.n_bit else x, weight)

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
