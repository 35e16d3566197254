"""Trainable quantized matrices: straight-through rounding of codes, scales and zero points.

The weight that `forward` returns equals, to the bit, the weight that `packed` stores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lfmc.calib_free.grid.grid_search import round_scale
from lfmc.calib_free.grid.packed_tensor import PackedTensor

MARGIN = 0.45  # a weight starts this many steps from its code if the code is not the nearest


class FakeQuant(nn.Module):
    """A weight `[N, K]` as `(code - zero) * scale`, with gradients (Bengio et al. 2013; Esser et
    al. 2020, "LSQ").

    The units of parameters do not depend on the matrix: `latent` `[N, G, group]` is the weight in
    steps of its initial scale, `log_scale` `[N, G, 1]` the logarithm of the scale over its initial
    value, `zero` `[N, G, 1]` the zero point (trained if the format stores one). The initial codes
    are those of `packed`: a weight keeps its value if it rounds to its code, and otherwise starts
    just inside the rounding interval of its code, on the side of the weight. `weight` and `packed`
    are on the CPU.
    """

    def __init__(self, weight: Tensor, packed: PackedTensor) -> None:
        super().__init__()
        self.format, self.rows, self.columns = packed.format, *packed.shape
        initial = packed.scales.float().unsqueeze(-1)  # (N, G, 1)
        self.initial_scale: Tensor
        self.register_buffer("initial_scale", initial)
        padding = packed.codes.shape[1] - self.columns
        grouped = nn.functional.pad(weight.float(), (0, padding)).view(*initial.shape[:2], -1)
        codes = packed.codes.view(grouped.shape).float()
        zero = torch.full_like(initial, self.format.zero_point)
        if packed.zeros is not None:
            zero = packed.zeros.float().unsqueeze(-1)
        steps = grouped / initial + zero
        differs = steps.round().clamp(0, 2**self.format.bits - 1) != codes
        steps = torch.where(differs, codes + MARGIN * (steps - codes).sign(), steps)
        self.latent = nn.Parameter(torch.where(differs, steps - zero, grouped / initial))
        self.log_scale = nn.Parameter(torch.zeros_like(initial))
        self.zero = nn.Parameter(zero, requires_grad=packed.zeros is not None)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point rounded as stored, `[N, G, 1]` each, straight-through."""
        scale = self.initial_scale * self.log_scale.exp()
        scale = straight_through(scale, round_scale(scale.detach(), self.format))
        highest = 2**self.format.bits - 1
        return scale, straight_through(self.zero, self.zero.detach().round().clamp(0, highest))

    def forward(self) -> Tensor:
        """Return the stored weight, float32 `[N, K]`."""
        scale, zero = self._grid()
        grid = (self.initial_scale, scale, zero, self.format.bits)
        weight: Tensor = _Round.apply(self.latent, *grid)  # type: ignore[no-untyped-call]
        return weight.view(self.rows, -1)[:, : self.columns]

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """Return the codes, scales and zero points of the weight of `forward`, on the CPU."""
        scale, zero = self._grid()
        codes = _steps(self.latent, self.initial_scale, scale, zero)
        codes = codes.round_().clamp_(0, 2**self.format.bits - 1)
        return PackedTensor(
            self.format,
            (self.rows, self.columns),
            codes.to(torch.uint8).view(self.rows, -1).cpu(),
            scale.squeeze(-1).to(getattr(torch, self.format.scale_dtype)).cpu(),
            None if self.format.symmetric else zero.squeeze(-1).to(torch.uint8).cpu(),
        )


class FakePalette(nn.Module):
    """A matrix with trainable palette tables and constant codes.

    `shift` `[N, 2^bits]` is the shift of each table value in standard deviations of its row.
    """

    def __init__(self, packed: PackedTensor) -> None:
        super().__init__()
        self.initial = packed
        self.codes: Tensor
        self.table: Tensor
        self.unit: Tensor
        self.register_buffer("codes", packed.codes.long())
        self.register_buffer("table", packed.scales.float())
        self.register_buffer("unit", packed.dequantize().std(1, correction=0, keepdim=True))
        self.shift = nn.Parameter(torch.zeros_like(self.table))

    def _rounded_table(self) -> Tensor:
        """Return the tables rounded to their stored dtype, straight-through."""
        table = self.table + self.shift * self.unit
        dtype = self.initial.scales.dtype
        limit = torch.finfo(dtype).max
        return straight_through(table, table.detach().clamp(-limit, limit).to(dtype).float())

    def forward(self) -> Tensor:
        """Return the stored weight, float32 `[N, K]`."""
        return self._rounded_table().gather(1, self.codes)

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """Return the codes with the rounded tables, on the CPU."""
        return replace(
            self.initial, scales=self._rounded_table().to(self.initial.scales.dtype).cpu()
        )


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Return exactly `rounded`, with the gradient of `value`."""
    result: Tensor = _StraightThrough.apply(value, rounded)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def _steps(latent: Tensor, initial: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the position of each weight on the grid in steps, before rounding."""
    return (latent * (initial / scale)).add_(zero)


class _Round(torch.autograd.Function):
    """Rounding with gradients where the code is not clamped, in one pass over the weights."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, initial: Tensor, scale: Tensor, zero: Tensor, bits: int
    ) -> Tensor:
        steps = _steps(latent, initial, scale, zero)
        ctx.save_for_backward(steps, initial, scale, zero)
        ctx.highest = 2**bits - 1
        return steps.round().clamp_(0, ctx.highest).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        steps, initial, scale, zero = ctx.saved_tensors
        codes = steps.round().clamp_(0, ctx.highest)
        unclamped_grad: Tensor = torch.ops.aten.hardtanh_backward(
            grad, steps, -0.5, ctx.highest + 0.5
        )
        # Minus the gradient of the clamped codes.
        clamped_grad = unclamped_grad.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)
        # d/d scale of (code - zero) * scale, where an unclamped code changes with 1 / scale:
        # grad (code - zero) - unclamped_grad (step - zero). Sum first: broadcasting one number per
        # group over its weights is slow.
        products = codes.mul_(grad).addcmul_(unclamped_grad, steps, value=-1)
        by_scale = products.sum(-1, keepdim=True).addcmul_(clamped_grad, zero)
        by_zero = clamped_grad * scale if ctx.needs_input_grad[3] else None
        return unclamped_grad.mul_(initial), None, by_scale, by_zero, None
