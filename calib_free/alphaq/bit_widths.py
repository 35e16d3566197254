"""AlphaQ's program: a width for every unit, least `sum(weight * 4^-bits)` under a total of bits.

A knapsack of one row with small integer widths, so dynamic programming over the bits that are
left solves it exactly, in time and memory units x bits (0.05 s for 2,112 matrices and 4 widths).
HiGHS solves the same program where that table would be too large, and to check it.
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

from lfmc.calib_free.allocate.highs import solver_silent
from lfmc.errors import GateError

TABLE_CELLS = 200_000_000  # one byte each
# HiGHS stops within 1e-6 of the optimum, whatever the costs: so the largest cost is far above 1.
SCALE = 1e7


def choose_widths(
    weights: Sequence[float], counts: Sequence[int], widths: Sequence[int], total: int
) -> list[int]:
    """A width for each of U units of `counts` matrices, at most `total` bits over all matrices.

    `widths` ascend, and `total` holds the narrowest everywhere. Minimises `sum(weights * 4^-bits)`
    exactly. Raises `GateError` if HiGHS is needed and proves no optimum.
    """
    if _spare(counts, widths, total) * len(weights) <= TABLE_CELLS:
        return widths_by_table(weights, counts, widths, total)
    return widths_by_milp(weights, counts, widths, total)


def widths_by_table(
    weights: Sequence[float], counts: Sequence[int], widths: Sequence[int], total: int
) -> list[int]:
    """`choose_widths` by dynamic programming."""
    step = math.gcd(*(width - widths[0] for width in widths), 0) or 1
    spare = _spare(counts, widths, total) // step
    extra = [(width - widths[0]) // step for width in widths]  # steps above the narrowest
    cost = _costs(weights, widths)
    least = np.zeros(spare + 1)  # of the units so far, by steps that may be spent
    choices = np.zeros((len(weights), spare + 1), dtype=np.uint8)
    for unit, count in enumerate(counts):
        now = least + cost[unit, 0]
        for choice, steps in enumerate(extra[1:], start=1):
            room = steps * count
            if room > spare:
                break
            other = least[: spare + 1 - room] + cost[unit, choice]
            better = other < now[room:]
            now[room:][better] = other[better]
            choices[unit, room:][better] = choice
        least = now
    picks, left = [], spare
    for unit in reversed(range(len(weights))):
        picks.append(int(choices[unit, left]))
        left -= extra[picks[-1]] * counts[unit]
    return [widths[pick] for pick in reversed(picks)]


def widths_by_milp(
    weights: Sequence[float], counts: Sequence[int], widths: Sequence[int], total: int
) -> list[int]:
    """`choose_widths` by HiGHS, within 1e-13 of the largest cost.

    Raises `GateError` without a proven optimum.
    """
    cost = SCALE * _costs(weights, widths)
    bits = np.outer(counts, widths).ravel()
    with solver_silent():
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
    """Costs `[U, W]`, the largest scaled to 1."""
    scaled = np.asarray(weights, dtype=np.float64) / max(*weights, 1e-300)
    return np.outer(scaled, 4.0 ** (widths[0] - np.array(widths)))


def _spare(counts: Sequence[int], widths: Sequence[int], total: int) -> int:
    """Bits that the narrowest widths leave, as far as the widest can use them."""
    return min(total - widths[0] * sum(counts), (widths[-1] - widths[0]) * sum(counts))
