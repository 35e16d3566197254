"""Rate-distortion curves: what each format does to each matrix, from a few of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.grid.grid_search import PALETTE, row_errors

ROWS = 24  # of every matrix, evenly spaced: enough for a relative error within a few percent

Curve = Mapping[Format, float]


def grid_for(number_format: Format, capabilities: Capabilities) -> str:
    """The searched grid that a format has on a target."""
    if number_format.palette:
        return PALETTE
    return "signed" if number_format.symmetric and capabilities.negative_scales else "clip"


def spread(rows: int, count: int) -> Tensor:
    """At most `count` row numbers, evenly spaced over `rows`, int64."""
    return torch.linspace(0, rows - 1, min(rows, count)).round().long()


def curves(
    weights: Mapping[str, Tensor],
    importance: Mapping[str, Tensor | None],
    formats: Sequence[Format],
    grids: Mapping[Format, str],
) -> dict[str, dict[Format, float]]:
    """Weighted squared error over weighted energy of each matrix in each of `formats`.

    `weights` are rows `[R, K]` that stand for the matrix (see `spread`), `importance` `[K]` the
    column weights (None: all alike). Matrices of one width are measured together.
    """
    found: dict[str, dict[Format, float]] = {name: {} for name in weights}
    for names in _by_width(weights):
        x = torch.cat([weights[name].float() for name in names])
        cost = torch.cat([_cost(weights[name], importance[name]) for name in names])
        owner = torch.repeat_interleave(torch.tensor([len(weights[name]) for name in names]))
        energy = _sums((x.square() * cost).sum(1), owner, len(names))
        for number_format in formats:
            errors = row_errors(x, cost, number_format, grids[number_format])
            shares = _sums(errors, owner, len(names)) / energy.clamp(min=1e-30)
            for name, share in zip(names, shares.tolist(), strict=True):
                found[name][number_format] = share
    return found


def _by_width(weights: Mapping[str, Tensor]) -> Iterable[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, rows in weights.items():
        groups.setdefault(rows.shape[1], []).append(name)
    return groups.values()


def _cost(rows: Tensor, importance: Tensor | None) -> Tensor:
    columns = torch.ones(rows.shape[1]) if importance is None else importance
    return (columns / columns.mean().clamp(min=1e-30)).expand(rows.shape)


def _sums(values: Tensor, owner: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_add_(0, owner, values.double())
