"""Chooses scales, zero points and codes for a matrix.

Every grid rounds its scales to the format's scale dtype *before* it chooses codes. The codes are
therefore the nearest ones for the scales that a target really multiplies with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.calib_free.grid.palettes import fit_palettes

PALETTE = "kmeans"  # the only grid for palettes, and only for palettes
GRIDS = ("minmax", "clip", "signed")
# How the range of a group is chosen: "minmax" takes the full range, "clip" searches for the least
# squared error, and "signed" searches with scales of either sign (a symmetric format can then put
# either extreme on its longer side).

SHRINKS = tuple(1.0 - 0.06 * i for i in range(11))  # shares of the full range, 1 to 0.4
REFITS = 3  # rounds of least squares for the scale, given the codes
CHUNK = 1 << 18  # elements quantized at a time: bounds the memory of the search


@dataclass(frozen=True)
class _Fit:
    """One choice for each group: `scale` and `zero` float32 `[R, G, 1]`, `error` `[R, G, 1]`."""

    scale: Tensor
    zero: Tensor
    error: Tensor

    def better_of(self, other: _Fit) -> _Fit:
        """Return the fit with the smaller error for each group; `self` if the errors are equal."""
        wins = other.error < self.error
        return _Fit(
            torch.where(wins, other.scale, self.scale),
            torch.where(wins, other.zero, self.zero),
            torch.where(wins, other.error, self.error),
        )


def quantize(
    weight: Tensor, number_format: Format, importance: Tensor | None, grid: str
) -> PackedTensor:
    """Quantize a finite float matrix `[N, K]`; deterministic. Rows become float32 in blocks.

    `importance` `[K]`, not negative, weighs the squared error of each column in a searched grid
    (None: equal weights). `grid` is one of `GRIDS`, or `PALETTE` for a palette. Dequantized weights
    are finite even for groups of zeros, groups of a single value, and groups whose scale is not
    exact in the scale dtype. Zeros stay exact.
    Raises `ValueError` for an unknown grid or shapes that do not match.
    """
    grids = (PALETTE,) if number_format.palette else GRIDS
    if grid not in grids:
        raise ValueError(f"unknown grid {grid!r}, expected one of {', '.join(grids)}")
    rows, columns = weight.shape
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance has shape {list(importance.shape)}, expected [{columns}]")
    cost = torch.ones(1, columns) if importance is None else importance.float().unsqueeze(0)
    if number_format.palette:
        codes, tables = fit_palettes(weight.float(), cost, number_format)
        return PackedTensor(number_format, (rows, columns), codes, tables, None)
    cost = _split_groups(cost, number_format)
    parts = [
        _quantize_chunk(_split_groups(weight[i], number_format), cost, number_format, grid)
        for i in _row_slices(rows, number_format.codes_per_row(columns))
    ]
    codes, scales, zeros = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return PackedTensor(
        number_format,
        (rows, columns),
        codes.view(rows, -1),
        scales,
        None if number_format.symmetric else zeros,
    )


def row_errors(weight: Tensor, cost: Tensor, number_format: Format, grid: str) -> Tensor:
    """Return the squared error of each row of `weight` `[N, K]` in a format, float32 `[N]`.

    `cost` `[N, K]` weighs the squared error of each element, in the search and in the sum.
    """
    if number_format.palette:
        codes, tables = fit_palettes(weight.float(), cost.float(), number_format)
        return ((tables.float().gather(1, codes.long()) - weight).square() * cost).sum(1)
    x, weights = _split_groups(weight, number_format), _split_groups(cost, number_format)
    fits = [
        _search(x[i], weights[i], number_format, grid) for i in _row_slices(len(x), x[0].numel())
    ]
    return torch.cat([fit.error.sum((1, 2)) for fit in fits])


def _split_groups(values: Tensor, number_format: Format) -> Tensor:
    """Reshape `[N, K]` to float32 `[N, G, group]`, padded with zeros."""
    columns = values.shape[1]
    padded = torch.nn.functional.pad(
        values.float(), (0, number_format.codes_per_row(columns) - columns)
    )
    return padded.view(len(values), -1, number_format.columns_per_group(columns))


def _row_slices(rows: int, size: int) -> list[slice]:
    """Return slices over rows of `size` elements, each of at most `CHUNK` elements."""
    step = max(1, CHUNK // size)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _quantize_chunk(
    x: Tensor, cost: Tensor, number_format: Format, grid: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes `[R, G, group]`, scales and zeros `[R, G]` of rows `x` `[R, G, group]`."""
    best = _search(x, cost, number_format, grid)
    codes = _nearest_codes(x, number_format, best.scale, best.zero)
    scales = best.scale.squeeze(-1).to(getattr(torch, number_format.scale_dtype))
    return codes.to(torch.uint8), scales, best.zero.squeeze(-1).to(torch.uint8)


def _search(x: Tensor, cost: Tensor, number_format: Format, grid: str) -> _Fit:
    """Return the best fit within the grid for every group of `x` `[R, G, group]`."""
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    high = x.amax(-1, keepdim=True).clamp(min=0.0)
    best = _range_fit(x, cost, number_format, low, high)
    best = _single_value_fit(x, cost, number_format, best)
    if grid == "minmax":
        return best
    for shrink in SHRINKS:
        if grid == "signed" and number_format.symmetric:
            best = best.better_of(_signed_fit(x, cost, number_format, low, high, shrink))
        else:
            best = best.better_of(_range_fit(x, cost, number_format, low * shrink, high * shrink))
    for _ in range(REFITS):
        best = best.better_of(_refit(x, cost, number_format, best))
    return best


def _nearest_codes(x: Tensor, number_format: Format, scale: Tensor, zero: Tensor) -> Tensor:
    return (x / scale + zero).round_().clamp_(0, 2**number_format.bits - 1)


def _evaluate(x: Tensor, cost: Tensor, number_format: Format, scale: Tensor, zero: Tensor) -> _Fit:
    """Return a fit of rounded `scale` and integer `zero`, with the weighted squared error."""
    difference = (_nearest_codes(x, number_format, scale, zero) - zero).mul_(scale).sub_(x)
    return _Fit(scale, zero, difference.square_().mul_(cost).sum(-1, keepdim=True))


def round_scale(scale: Tensor, number_format: Format) -> Tensor:
    """Round the scale to its dtype: never infinite, and 1 if it rounds to zero (codes are 0)."""
    dtype = getattr(torch, number_format.scale_dtype)
    limit = torch.finfo(dtype).max
    rounded = scale.clamp(-limit, limit).to(dtype).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _range_fit(x: Tensor, cost: Tensor, number_format: Format, low: Tensor, high: Tensor) -> _Fit:
    """Return the fit that spans `low <= 0 <= high`; a symmetric one spans the larger extreme."""
    if number_format.symmetric:
        positive, negative = 2 ** (number_format.bits - 1) - 1, 2 ** (number_format.bits - 1)
        scale = torch.maximum(high / max(positive, 1), -low / negative)
        zero = torch.full_like(scale, number_format.zero_point)
        return _evaluate(x, cost, number_format, round_scale(scale, number_format), zero)
    steps = 2**number_format.bits - 1
    scale = round_scale((high - low) / steps, number_format)
    return _evaluate(x, cost, number_format, scale, (-low / scale).round_().clamp_(0, steps))


def _signed_fit(
    x: Tensor, cost: Tensor, number_format: Format, low: Tensor, high: Tensor, shrink: float
) -> _Fit:
    """Return the fit with the larger extreme at code 0, the longer side, as in Q4_0.

    The sign of the extreme goes into the scale.
    """
    extreme = torch.where(high > -low, high, low)
    scale = round_scale(-shrink * extreme / number_format.zero_point, number_format)
    zero = torch.full_like(scale, number_format.zero_point)
    return _evaluate(x, cost, number_format, scale, zero)


def _single_value_fit(x: Tensor, cost: Tensor, number_format: Format, best: _Fit) -> _Fit:
    """Return `best`, or the exact fit for groups of zeros and one other value.

    The step size is that value.
    """
    extreme = torch.where(x.amax(-1, keepdim=True) > 0, x.amax(-1, keepdim=True), x.amin(-1, True))
    size = round_scale(extreme.abs(), number_format)
    zero = (
        torch.full_like(size, number_format.zero_point)
        if number_format.symmetric
        else (extreme < 0).float()
    )
    single = ((x == extreme) | (x == 0)).all(-1, keepdim=True)
    exact = _evaluate(x, cost, number_format, size, zero)
    exact = _Fit(size, zero, torch.where(single, exact.error, torch.inf))
    return best.better_of(exact)


def _refit(x: Tensor, cost: Tensor, number_format: Format, fit: _Fit) -> _Fit:
    """Return a fit with the scale of least weighted squared error for the codes of `fit`."""
    steps = _nearest_codes(x, number_format, fit.scale, fit.zero) - fit.zero
    power = (steps.square() * cost).sum(-1, keepdim=True)
    scale = (steps * x * cost).sum(-1, keepdim=True) / power.clamp(min=1e-30)
    return _evaluate(x, cost, number_format, round_scale(scale, number_format), fit.zero)
