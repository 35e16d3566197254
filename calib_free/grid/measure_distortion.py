"""Measuring what formats do to one matrix, from some of its rows: work for any worker."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.grid.distortion_curves import curves
from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.calib_free.grid.importance import decode

RULE = "auto-1"  # raise the number when anything changes that a measurement depends on


@dataclass(frozen=True)
class Task:
    """A matrix `[N, K]` as far as it takes part: a few rows, and what an error in them costs.

    `importance` has a letter a column. `spread` `[S, K]` are evenly spaced rows, `rows` `[R, K]`
    those of `information` float32 `[R, K]`, the Fisher information times how many rows each
    stands for; all in the dtype that is stored. `reference` is the format whose cost is measured.
    """

    name: str
    importance: str
    spread: Tensor
    rows: Tensor
    information: Tensor
    formats: tuple[Format, ...]
    grids: tuple[str, ...]
    reference: Format


@dataclass(frozen=True)
class Finding:
    """Of a matrix: its importance, the cost of the reference format in nats per token, and the
    weighted squared error over weighted energy in each of the task's formats, in order."""

    importance: str
    cost: float
    errors: tuple[float, ...]


def measure_task(task: Task) -> Finding:
    """Equation (1) of docs/allocation.md at the reference, and the curve of every format."""
    columns = decode(task.importance, task.name)
    grids = dict(zip(task.formats, task.grids, strict=True))
    found = curves({task.name: task.spread}, {task.name: columns}, task.formats, grids)[task.name]
    weight = task.rows.float()
    packed = quantize(weight, task.reference, columns, grids[task.reference])
    wrong = (packed.dequantize() - weight).square_()
    cost = 0.5 * float((wrong * task.information).sum(dtype=torch.float64))
    return Finding(task.importance, cost, tuple(found[f] for f in task.formats))
