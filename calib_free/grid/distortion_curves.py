"""Rate-distortion curves: the error of each matrix in each format, from a sample of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.grid.grid_search import PALETTE, row_errors

ROWS = 24  # of every matrix, evenly spaced: enough for a relative error within a few percent

Curve = Mapping[Format, float]


def grid_for(number_format: Format, capabilities: Capabilities) -> str:
    """Return the searched grid that a target supports for a format."""
    if number_format.palette:
        return PALETTE
    return "signed" if number_format.symmetric and capabilities.negative_scales else "clip"


def spaced_rows(rows: int, count: int) -> Tensor:
    """Return at most `count` row numbers, evenly spaced over `rows`, int64."""
    return torch.linspace(0, rows - 1, min(rows, count)).round().long()


def measure_curves(
    weights: Mapping[str, Tensor],
    importance: Mapping[str, Tensor | None],
    formats: Sequence[Format],
    grids: Mapping[Format, str],
) -> dict[str, dict[Format, float]]:
    """Return the weighted squared error of each matrix in each format, divided by weighted energy.

    `weights` are rows `[R, K]` that represent the matrix (see `spaced_rows`). `importance` `[K]`
    are the column weights (None: equal weights). Matrices of the same width are measured together.
    """
    curves: dict[str, dict[Format, float]] = {name: {} for name in weights}
    for names in _group_by_width(weights):
        x = torch.cat([weights[name].float() for name in names])
        cost = torch.cat([_element_cost(weights[name], importance[name]) for name in names])
        owner = torch.repeat_interleave(torch.tensor([len(weights[name]) for name in names]))
        energy = _sum_by_owner((x.square() * cost).sum(1), owner, len(names))
        for number_format in formats:
            errors = row_errors(x, cost, number_format, grids[number_format])
            ratios = _sum_by_owner(errors, owner, len(names)) / energy.clamp(min=1e-30)
            for name, ratio in zip(names, ratios.tolist(), strict=True):
                curves[name][number_format] = ratio
    return curves


def _group_by_width(weights: Mapping[str, Tensor]) -> Iterable[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, rows in weights.items():
        groups.setdefault(rows.shape[1], []).append(name)
    return groups.values()


def _element_cost(rows: Tensor, importance: Tensor | None) -> Tensor:
    columns = torch.ones(rows.shape[1]) if importance is None else importance
    return (columns / columns.mean().clamp(min=1e-30)).expand(rows.shape)


def _sum_by_owner(values: Tensor, owner: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_add_(0, owner, values.double())
