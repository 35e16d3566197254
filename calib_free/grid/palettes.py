"""Palettes: a table of values for each row of a matrix, by weighted k-means (Lloyd 1982)."""

from __future__ import annotations

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format

ROUNDS = 10  # of assigning and averaging
CHUNK = 1 << 20  # elements at a time: bounds memory


def fit_palettes(weight: Tensor, cost: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[N, K]` and tables `[N, 2^bits]`, ascending, in the format's scale dtype.

    `weight` is float32 `[N, K]`, finite; `cost` `[N or 1, K]`, not negative, weighs the squared
    error of each element. Values are rounded to the dtype before codes are chosen. From two
    beginnings, evenly spaced values and quantiles drawn half way to these, the better of each row.
    """
    step = max(1, CHUNK // weight.shape[1])
    parts = []
    for start in range(0, len(weight), step):
        x = weight[start : start + step].contiguous()
        weights = cost if len(cost) == 1 else cost[start : start + step]
        parts.append(_best(x, weights.expand_as(x).contiguous(), number_format))
    codes, tables = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(tables)


def _best(x: Tensor, cost: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    count = 1 << f.bits
    shares = torch.linspace(0, 1, count)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    even = low + (high - low) * shares
    places = ((shares * (count - 1) + 0.5) / count * (x.shape[1] - 1)).round().long()
    quantiles = x.sort(1).values[:, places]
    found = [_lloyd(x, cost, begun, f) for begun in (even, (even + quantiles) / 2)]
    errors = [
        ((table.float().gather(1, codes) - x).square() * cost).sum(1) for codes, table in found
    ]
    second = (errors[1] < errors[0]).unsqueeze(1)
    codes = torch.where(second, found[1][0], found[0][0])
    return codes.to(torch.uint8), torch.where(second, found[1][1], found[0][1])


def _lloyd(x: Tensor, cost: Tensor, table: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    """Codes int64 and tables from a first guess.

    Of the values that nothing is nearest to, one a row and round goes where the error is largest.
    """
    weighted = x * cost
    for _ in range(ROUNDS):
        codes = _nearest(x, table)
        total = torch.zeros_like(table).scatter_add_(1, codes, weighted)
        mass = torch.zeros_like(table).scatter_add_(1, codes, cost)
        table = torch.where(mass > 0, total / mass.clamp(min=1e-30), table)
        idle, place = (mass == 0).max(1)
        error = (table.gather(1, codes) - x).square_().mul_(cost)
        worst = x.gather(1, error.argmax(1, keepdim=True))
        moved = table.scatter(1, place.unsqueeze(1), worst)
        table = torch.where(idle.unsqueeze(1), moved, table).sort(1).values
    limit = torch.finfo(getattr(torch, f.scale_dtype)).max
    stored = table.clamp(-limit, limit).to(getattr(torch, f.scale_dtype))
    return _nearest(x, stored.float()), stored


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """For each of `x` `[N, K]` the place of the nearest value of its row's table, ascending."""
    between = (table[:, 1:] + table[:, :-1]) / 2
    return torch.searchsorted(between.contiguous(), x)
