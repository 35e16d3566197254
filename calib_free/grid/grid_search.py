"""Choosing scales, zero points and codes for a matrix.

Every grid rounds its scales to the format's scale dtype *before* it chooses codes, so codes are
the nearest ones to what a target will really multiply with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.calib_free.grid.palettes import fit_palettes

PALETTE = "kmeans"  # the only grid of a palette, and of nothing else
GRIDS = ("minmax", "clip", "signed")
# How a group's range is chosen: from end to end; searched for least squared error; or searched
# with scales of either sign (a symmetric format then puts either extreme on its longer side).

SHRINKS = tuple(1.0 - 0.06 * i for i in range(11))  # shares of the full range, 1 to 0.4
REFITS = 3  # rounds of least squares for the scale, given the codes
CHUNK = 1 << 18  # elements quantized at a time: bounds the memory of the search


@dataclass(frozen=True)
class _Fit:
    """One choice a group: `scale` and `zero` float32 `[R, G, 1]`, `error` `[R, G, 1]`."""

    scale: Tensor
    zero: Tensor
    error: Tensor

    def better_of(self, other: _Fit) -> _Fit:
        """Group by group the fit of smaller error; this one where they are equal."""
        wins = other.error < self.error
        return _Fit(
            torch.where(wins, other.scale, self.scale),
            torch.where(wins, other.zero, self.zero),
            torch.where(wins, other.error, self.error),
        )


def quantize(
    weight: Tensor, number_format: Format, importance: Tensor | None, grid: str
) -> PackedTensor:
    """Quantize a finite float32 matrix `[N, K]`; the same input gives the same codes.

    `importance` `[K]`, not negative, weighs the squared error of each column in a searched grid
    (None: all alike); `grid` is one of `GRIDS`, or `PALETTE` for a palette. Groups of zeros, of one
    value, and of values whose scale the scale dtype holds only rounded give finite weights; zeros
    stay exact.
    Raises `ValueError` for an unknown grid or shapes that do not fit.
    """
    known = (PALETTE,) if number_format.palette else GRIDS
    if grid not in known:
        raise ValueError(f"unknown grid {grid!r}, expected one of {', '.join(known)}")
    rows, columns = weight.shape
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance has shape {list(importance.shape)}, expected [{columns}]")
    cost = torch.ones(1, columns) if importance is None else importance.float().unsqueeze(0)
    if number_format.palette:
        codes, tables = fit_palettes(weight.float(), cost, number_format)
        return PackedTensor(number_format, (rows, columns), codes, tables, None)
    x, cost = _grouped(weight, number_format), _grouped(cost, number_format)
    parts = [_chunk(x[i], cost, number_format, grid) for i in _slices(x)]
    codes, scales, zeros = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return PackedTensor(
        number_format,
        (rows, columns),
        codes.view(rows, -1),
        scales,
        None if number_format.symmetric else zeros,
    )


def row_errors(weight: Tensor, cost: Tensor, number_format: Format, grid: str) -> Tensor:
    """Squared error of each row of `weight` `[N, K]` in a format, float32 `[N]`.

    `cost` `[N, K]` weighs the error of each element, in the search and in the sum.
    """
    if number_format.palette:
        codes, tables = fit_palettes(weight.float(), cost.float(), number_format)
        return ((tables.float().gather(1, codes.long()) - weight).square() * cost).sum(1)
    x, weights = _grouped(weight, number_format), _grouped(cost, number_format)
    fits = [_search(x[i], weights[i], number_format, grid) for i in _slices(x)]
    return torch.cat([fit.error.sum((1, 2)) for fit in fits])


def _grouped(values: Tensor, f: Format) -> Tensor:
    """`[N, K]` as float32 `[N, G, group]`, padded with zeros."""
    columns = values.shape[1]
    padded = torch.nn.functional.pad(values.float(), (0, f.codes(columns) - columns))
    return padded.view(len(values), -1, f.span(columns))


def _slices(x: Tensor) -> list[slice]:
    """Rows of `[N, G, group]` a few at a time."""
    step = max(1, CHUNK // x[0].numel())
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _chunk(x: Tensor, cost: Tensor, f: Format, grid: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[R, G, group]`, scales `[R, G]` and zeros `[R, G]` of rows `x` `[R, G, group]`."""
    best = _search(x, cost, f, grid)
    codes = _codes(x, f, best.scale, best.zero)
    scales = best.scale.squeeze(-1).to(getattr(torch, f.scale_dtype))
    return codes.to(torch.uint8), scales, best.zero.squeeze(-1).to(torch.uint8)


def _search(x: Tensor, cost: Tensor, f: Format, grid: str) -> _Fit:
    """The best fit of every group of `x` `[R, G, group]` that the grid knows."""
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    high = x.amax(-1, keepdim=True).clamp(min=0.0)
    best = _range_fit(x, cost, f, low, high)
    best = _one_value(x, cost, f, best)
    if grid == "minmax":
        return best
    for shrink in SHRINKS:
        if grid == "signed" and f.symmetric:
            best = best.better_of(_signed_fit(x, cost, f, low, high, shrink))
        else:
            best = best.better_of(_range_fit(x, cost, f, low * shrink, high * shrink))
    for _ in range(REFITS):
        best = best.better_of(_refit(x, cost, f, best))
    return best


def _codes(x: Tensor, f: Format, scale: Tensor, zero: Tensor) -> Tensor:
    return (x / scale + zero).round_().clamp_(0, 2**f.bits - 1)


def _fit(x: Tensor, cost: Tensor, f: Format, scale: Tensor, zero: Tensor) -> _Fit:
    """The fit of rounded `scale` and integer `zero`, with the weighted squared error of a group."""
    wrong = (_codes(x, f, scale, zero) - zero).mul_(scale).sub_(x)
    return _Fit(scale, zero, wrong.square_().mul_(cost).sum(-1, keepdim=True))


def round_scale(scale: Tensor, f: Format) -> Tensor:
    """The scale as the dtype holds it: never infinite; where it rounds to zero, 1 (codes are 0)."""
    dtype = getattr(torch, f.scale_dtype)
    limit = torch.finfo(dtype).max
    rounded = scale.clamp(-limit, limit).to(dtype).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _range_fit(x: Tensor, cost: Tensor, f: Format, low: Tensor, high: Tensor) -> _Fit:
    """The grid that spans `low <= 0 <= high`; a symmetric one reaches the larger of the two."""
    if f.symmetric:
        positive, negative = 2 ** (f.bits - 1) - 1, 2 ** (f.bits - 1)
        scale = torch.maximum(high / max(positive, 1), -low / negative)
        return _fit(x, cost, f, round_scale(scale, f), torch.full_like(scale, f.zero_point))
    steps = 2**f.bits - 1
    scale = round_scale((high - low) / steps, f)
    return _fit(x, cost, f, scale, (-low / scale).round_().clamp_(0, steps))


def _signed_fit(
    x: Tensor, cost: Tensor, f: Format, low: Tensor, high: Tensor, shrink: float
) -> _Fit:
    """The larger extreme sits at code 0, the longer side; the scale takes its sign (Q4_0)."""
    extreme = torch.where(high > -low, high, low)
    scale = round_scale(-shrink * extreme / f.zero_point, f)
    return _fit(x, cost, f, scale, torch.full_like(scale, f.zero_point))


def _one_value(x: Tensor, cost: Tensor, f: Format, best: _Fit) -> _Fit:
    """Where a group holds zeros and one other value, one step of that size is exact."""
    extreme = torch.where(x.amax(-1, keepdim=True) > 0, x.amax(-1, keepdim=True), x.amin(-1, True))
    size = round_scale(extreme.abs(), f)
    zero = torch.full_like(size, f.zero_point) if f.symmetric else (extreme < 0).float()
    single = ((x == extreme) | (x == 0)).all(-1, keepdim=True)
    exact = _fit(x, cost, f, size, zero)
    exact = _Fit(size, zero, torch.where(single, exact.error, torch.inf))
    return best.better_of(exact)


def _refit(x: Tensor, cost: Tensor, f: Format, fit: _Fit) -> _Fit:
    """The scale of least weighted squared error for the codes that `fit` chose."""
    steps = _codes(x, f, fit.scale, fit.zero) - fit.zero
    power = (steps.square() * cost).sum(-1, keepdim=True)
    scale = (steps * x * cost).sum(-1, keepdim=True) / power.clamp(min=1e-30)
    return _fit(x, cost, f, round_scale(scale, f), fit.zero)
