"""Measures the distortion of one matrix in several formats; runs on any worker."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.grid.distortion_curves import measure_curves
from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.calib_free.grid.importance import decode_importance

RULE = "auto-1"  # increase the number after any change that affects a measurement


@dataclass(frozen=True)
class Task:
    """The rows of a matrix `[N, K]` that a measurement needs, and the cost of errors in them.

    `importance` has one letter for each column. `sample` `[S, K]` are evenly spaced rows. `rows`
    `[R, K]` are the rows of `information` float32 `[R, K]`: the Fisher information times the number
    of rows that each one represents. Rows have the stored dtype. `reference` is the format whose
    cost is measured.
    """

    name: str
    importance: str
    sample: Tensor
    rows: Tensor
    information: Tensor
    formats: tuple[Format, ...]
    grids: tuple[str, ...]
    reference: Format


@dataclass(frozen=True)
class Distortion:
    """The importance of a matrix, its cost in the reference format, and its error in each format.

    `cost` is in nats per token. `errors` are weighted squared errors over the weighted energy, in
    the order of the task's formats.
    """

    importance: str
    cost: float
    errors: tuple[float, ...]


def measure_task(task: Task) -> Distortion:
    """Compute equation (1) of docs/allocation.md at the reference, and the error in each format."""
    columns = decode_importance(task.importance, task.name)
    grids = dict(zip(task.formats, task.grids, strict=True))
    curves = measure_curves({task.name: task.sample}, {task.name: columns}, task.formats, grids)
    curve = curves[task.name]
    weight = task.rows.float()
    packed = quantize(weight, task.reference, columns, grids[task.reference])
    squared_error = (packed.dequantize() - weight).square_()
    cost = 0.5 * float((squared_error * task.information).sum(dtype=torch.float64))
    return Distortion(task.importance, cost, tuple(curve[f] for f in task.formats))
