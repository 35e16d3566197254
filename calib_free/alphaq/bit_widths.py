"""AlphaQ's program: bit widths that minimize `sum(weight * 4^-bits)` under a total of bits.

It is a knapsack with one constraint and small integer bit widths. Dynamic programming over the
remaining bits solves it exactly, in time and memory units x bits (0.05 s for 2,112 matrices and 4
widths). HiGHS solves the same program if that table would be too large, and in tests of the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import (  # type: ignore[import-untyped]
    Bounds,
    LinearConstraint,
    milp,
)
from scipy.sparse import csr_matrix, eye, kron  # type: ignore[import-untyped]

from lfmc.calib_free.allocate.highs import silence_solver
from lfmc.errors import GateError

TABLE_CELLS = 200_000_000  # one byte each
# HiGHS stops within an absolute 1e-6 of the optimum, so the largest cost is scaled far above 1.
SCALE = 1e7


def choose_widths(
    weights: Sequence[float], counts: Sequence[int], widths: Sequence[int], total: int
) -> list[int]:
    """Return a bit width for each of U units, with at most `total` bits over all matrices.

    Unit u has `counts[u]` matrices. `widths` ascend, and `total` is enough for the narrowest width
    everywhere. Minimises `sum(weights * 4^-bits)` exactly. Raises `GateError` if HiGHS is needed
    and can't prove an optimum.
    """
    if _spare(counts, widths, total) * len(weights) <= TABLE_CELLS:
        return widths_by_table(weights, counts, widths, total)
    return widths_by_milp(weights, counts, widths, total)


def widths_by_table(
    weights: Sequence[float], counts: Sequence[int], widths: Sequence[int], total: int
) -> list[int]:
    """Compute `choose_widths` by dynamic programming."""
    step = math.gcd(*(width - widths[0] for width in widths), 0) or 1
    spare_steps = _spare(counts, widths, total) // step
    extra_steps = [(width - widths[0]) // step for width in widths]  # steps above the narrowest
    cost = _costs(weights, widths)
    min_cost = np.zeros(spare_steps + 1)  # cost of the units so far, by spare steps
    choices = np.zeros((len(weights), spare_steps + 1), dtype=np.uint8)
    for unit, count in enumerate(counts):
        new_cost = min_cost + cost[unit, 0]
        for choice, steps in enumerate(extra_steps[1:], start=1):
            used_steps = steps * count
            if used_steps > spare_steps:
                break
            candidate = min_cost[: spare_steps + 1 - used_steps] + cost[unit, choice]
            better = candidate < new_cost[used_steps:]
            new_cost[used_steps:][better] = candidate[better]
            choices[unit, used_steps:][better] = choice
        min_cost = new_cost
    picks, remaining = [], spare_steps
    for unit in reversed(range(len(weights))):
        picks.append(int(choices[unit, remaining]))
        remaining -= extra_steps[picks[-1]] * counts[unit]
    return [widths[pick] for pick in reversed(picks)]


def widths_by_milp(
    weights: Sequence[float], counts: Sequence[int], widths: Sequence[int], total: int
) -> list[int]:
    """Compute `choose_widths` with HiGHS, within 1e-13 of the largest cost.

    Raises `GateError` if HiGHS can't prove an optimum.
    """
    cost = SCALE * _costs(weights, widths)
    bits = np.outer(counts, widths).ravel()
    with silence_solver():
        result = milp(
            cost.ravel(),
            integrality=np.ones(cost.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(kron(eye(len(weights)), np.ones((1, len(widths)))), 1.0, 1.0),
                LinearConstraint(csr_matrix(bits), -np.inf, total),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if result.status != 0 or result.x is None:
        raise GateError("the solver found no optimal widths", where="HiGHS", got=result.message)
    picks = np.round(result.x).reshape(cost.shape).argmax(axis=1)
    return [widths[pick] for pick in picks]


def _costs(weights: Sequence[float], widths: Sequence[int]) -> NDArray[np.float64]:
    """Return costs `[U, W]`, scaled so that the largest is 1."""
    scaled = np.asarray(weights, dtype=np.float64) / max(*weights, 1e-300)
    return np.outer(scaled, 4.0 ** (widths[0] - np.array(widths)))


def _spare(counts: Sequence[int], widths: Sequence[int], total: int) -> int:
    """Return the bits that remain above the narrowest widths, at most what the widest can use."""
    return min(total - widths[0] * sum(counts), (widths[-1] - widths[0]) * sum(counts))
