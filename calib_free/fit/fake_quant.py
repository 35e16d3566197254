"""A quantized matrix that can be trained: straight-through rounding of codes, scales and zeros.

What it stands for while it trains is, to the bit, what `packed` stores when it is done.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lfmc.calib_free.grid.grid_search import round_scale
from lfmc.calib_free.grid.packed_tensor import PackedTensor

MARGIN = 0.45  # steps from a code at which a weight is put that was rounded further away


class FakeQuant(nn.Module):
    """`(code - zero) * scale` of a weight `[N, K]`, with gradients (Bengio et al. 2013; Esser et
    al. 2020, "LSQ").

    Parameters are in units that mean the same for every matrix: `latent` `[N, G, group]` is the
    weight in steps of its first scale, `log_scale` `[N, G, 1]` the logarithm of the scale over its
    first value, `zero` `[N, G, 1]` the zero point (trained where the format stores one). Starts
    from `packed`: a weight lies where it is, unless that would round to another code; then it lies
    just inside of its code, on the side of the weight. Both are on the CPU.
    """

    def __init__(self, weight: Tensor, packed: PackedTensor) -> None:
        super().__init__()
        self.format, self.rows, self.columns = packed.format, *packed.shape
        first = packed.scales.float().unsqueeze(-1)  # (N, G, 1)
        self.first_scale: Tensor
        self.register_buffer("first_scale", first)
        padding = packed.codes.shape[1] - self.columns
        grouped = nn.functional.pad(weight.float(), (0, padding)).view(*first.shape[:2], -1)
        codes = packed.codes.view(grouped.shape).float()
        zero = torch.full_like(first, self.format.zero_point)
        if packed.zeros is not None:
            zero = packed.zeros.float().unsqueeze(-1)
        steps = grouped / first + zero
        moved = steps.round().clamp(0, 2**self.format.bits - 1) != codes
        steps = torch.where(moved, codes + MARGIN * (steps - codes).sign(), steps)
        self.latent = nn.Parameter(torch.where(moved, steps - zero, grouped / first))
        self.log_scale = nn.Parameter(torch.zeros_like(first))
        self.zero = nn.Parameter(zero, requires_grad=packed.zeros is not None)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as the format holds them, `[N, G, 1]` each, straight-through."""
        scale = self.first_scale * self.log_scale.exp()
        scale = straight_through(scale, round_scale(scale.detach(), self.format))
        highest = 2**self.format.bits - 1
        return scale, straight_through(self.zero, self.zero.detach().round().clamp(0, highest))

    def forward(self) -> Tensor:
        """The weight that is stored, float32 `[N, K]`."""
        scale, zero = self._grid()
        grid = (self.first_scale, scale, zero, self.format.bits)
        weight: Tensor = _Round.apply(self.latent, *grid)  # type: ignore[no-untyped-call]
        return weight.view(self.rows, -1)[:, : self.columns]

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """Codes, scales and zeros of what `forward` gives, on the CPU."""
        scale, zero = self._grid()
        codes = _steps(self.latent, self.first_scale, scale, zero)
        codes = codes.round_().clamp_(0, 2**self.format.bits - 1)
        return PackedTensor(
            self.format,
            (self.rows, self.columns),
            codes.to(torch.uint8).view(self.rows, -1).cpu(),
            scale.squeeze(-1).to(getattr(torch, self.format.scale_dtype)).cpu(),
            None if self.format.symmetric else zero.squeeze(-1).to(torch.uint8).cpu(),
        )


class FakePalette(nn.Module):
    """A palette whose tables can be trained; its codes stay.

    `moved` `[N, 2^bits]` is how far each value has moved, in standard deviations of its row.
    """

    def __init__(self, packed: PackedTensor) -> None:
        super().__init__()
        self.first = packed
        self.codes: Tensor
        self.table: Tensor
        self.unit: Tensor
        self.register_buffer("codes", packed.codes.long())
        self.register_buffer("table", packed.scales.float())
        self.register_buffer("unit", packed.dequantize().std(1, correction=0, keepdim=True))
        self.moved = nn.Parameter(torch.zeros_like(self.table))

    def _stored(self) -> Tensor:
        table = self.table + self.moved * self.unit
        dtype = self.first.scales.dtype
        limit = torch.finfo(dtype).max
        return straight_through(table, table.detach().clamp(-limit, limit).to(dtype).float())

    def forward(self) -> Tensor:
        """The weight that is stored, float32 `[N, K]`."""
        return self._stored().gather(1, self.codes)

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """The codes, with the tables of what `forward` gives, on the CPU."""
        return replace(self.first, scales=self._stored().to(self.first.scales.dtype).cpu())


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of `value`."""
    result: Tensor = _Straight.apply(value, rounded)  # type: ignore[no-untyped-call]
    return result


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def _steps(latent: Tensor, first: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Where each weight lies on the grid, before rounding."""
    return (latent * (first / scale)).add_(zero)


class _Round(torch.autograd.Function):
    """Rounding whose gradient passes where the code is not clamped; one pass over the weights."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, first: Tensor, scale: Tensor, zero: Tensor, bits: int
    ) -> Tensor:
        steps = _steps(latent, first, scale, zero)
        ctx.save_for_backward(steps, first, scale, zero)
        ctx.highest = 2**bits - 1
        return steps.round().clamp_(0, ctx.highest).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        steps, first, scale, zero = ctx.saved_tensors
        codes = steps.round().clamp_(0, ctx.highest)
        passed: Tensor = torch.ops.aten.hardtanh_backward(grad, steps, -0.5, ctx.highest + 0.5)
        lost = passed.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)  # where it is clamped
        # d/d scale of (code - zero) * scale, where an unclamped code moves with 1 / scale:
        # grad (code - zero) - passed (step - zero). Sums first: numbers a group, spread over its
        # weights, are slow.
        products = codes.mul_(grad).addcmul_(passed, steps, value=-1)
        by_scale = products.sum(-1, keepdim=True).addcmul_(lost, zero)
        by_zero = lost * scale if ctx.needs_input_grad[3] else None
        return passed.mul_(first), None, by_scale, by_zero, None
