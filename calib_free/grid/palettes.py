"""Palettes: one table of values for each row of a matrix, by weighted k-means (Lloyd 1982)."""

from __future__ import annotations

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format

ROUNDS = 10  # of assignment and averaging
CHUNK = 1 << 20  # elements processed at a time: bounds memory


def fit_palettes(weight: Tensor, cost: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Return codes uint8 `[N, K]` and tables `[N, 2^bits]`, ascending, in the scale dtype.

    `weight` is float32 `[N, K]`, finite; `cost` `[N or 1, K]`, not negative, weighs the squared
    error of each element. Table values are rounded to the dtype before the codes are chosen. Each
    row starts from two tables, evenly spaced values and the mean of these and the quantiles, and
    keeps the better result.
    """
    step = max(1, CHUNK // weight.shape[1])
    parts = []
    for start in range(0, len(weight), step):
        x = weight[start : start + step].contiguous()
        weights = cost if len(cost) == 1 else cost[start : start + step]
        parts.append(_fit_chunk(x, weights.expand_as(x).contiguous(), number_format))
    codes, tables = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(tables)


def _fit_chunk(x: Tensor, cost: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    count = 1 << number_format.bits
    shares = torch.linspace(0, 1, count)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    even_table = low + (high - low) * shares
    positions = ((shares * (count - 1) + 0.5) / count * (x.shape[1] - 1)).round().long()
    quantiles = x.sort(1).values[:, positions]
    fits = [
        _lloyd(x, cost, start, number_format)
        for start in (even_table, (even_table + quantiles) / 2)
    ]
    errors = [
        ((table.float().gather(1, codes) - x).square() * cost).sum(1) for codes, table in fits
    ]
    second_wins = (errors[1] < errors[0]).unsqueeze(1)
    codes = torch.where(second_wins, fits[1][0], fits[0][0])
    return codes.to(torch.uint8), torch.where(second_wins, fits[1][1], fits[0][1])


def _lloyd(x: Tensor, cost: Tensor, table: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Return codes int64 and tables, refined from the starting `table`.

    In each round and row, one table entry without codes moves to the value with the largest error.
    """
    weighted = x * cost
    for _ in range(ROUNDS):
        codes = _nearest_entries(x, table)
        total = torch.zeros_like(table).scatter_add_(1, codes, weighted)
        mass = torch.zeros_like(table).scatter_add_(1, codes, cost)
        table = torch.where(mass > 0, total / mass.clamp(min=1e-30), table)
        unused, entry = (mass == 0).max(1)
        error = (table.gather(1, codes) - x).square_().mul_(cost)
        worst_value = x.gather(1, error.argmax(1, keepdim=True))
        reseeded = table.scatter(1, entry.unsqueeze(1), worst_value)
        table = torch.where(unused.unsqueeze(1), reseeded, table).sort(1).values
    limit = torch.finfo(getattr(torch, number_format.scale_dtype)).max
    stored = table.clamp(-limit, limit).to(getattr(torch, number_format.scale_dtype))
    return _nearest_entries(x, stored.float()), stored


def _nearest_entries(x: Tensor, table: Tensor) -> Tensor:
    """Return for each `x` `[N, K]` the index of the nearest value in its row's ascending table."""
    midpoints = (table[:, 1:] + table[:, :-1]) / 2
    return torch.searchsorted(midpoints.contiguous(), x)
