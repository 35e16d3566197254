"""The multiple-choice knapsack: one option a unit, least total cost, never over the byte limit.

`solve` first follows the Lagrangian `min sum(cost + price * nbytes)`: for every price each unit
decides alone, and the best dual value bounds what any solution can reach (Everett 1963; Sinha &
Zoltners 1979). What that leaves of the limit is spent greedily. Where the program is of moderate
size and a gap remains, HiGHS (`scipy.optimize.milp`) closes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lfmc.calib_free.allocate.highs import GAP, exact
from lfmc.calib_free.allocate.knapsack_problem import Choice, Picks, Problem, Solution
from lfmc.errors import InputError

MILP_BINARIES = 20_000  # above this the Lagrangian answer, whose gap shrinks with size, stands
_HALVINGS = 100


def smallest(choices: Sequence[Choice]) -> int:
    """The fewest bytes that any solution takes."""
    problem = Problem(choices)
    return problem.nbytes(problem.cheapest(np.inf))


def solve(choices: Sequence[Choice], limit: int) -> Solution:
    """One option a choice, of least total cost within `limit` bytes.

    Raises `InputError` where even the smallest options take more.
    """
    problem = Problem(choices)
    picks = problem.cheapest(np.inf)
    if problem.nbytes(picks) > limit:
        raise InputError(
            "no choice of formats fits the budget",
            expected=f"at least {problem.nbytes(picks)} bytes",
            got=f"{limit} bytes",
        )
    best = _lagrangian(problem, picks, limit)
    if best.gap > GAP and problem.size <= MILP_BINARIES:
        best = exact(problem, best, limit)
    return best


def _lagrangian(problem: Problem, smallest: Picks, limit: int) -> Solution:
    """Bisect the price to the least one that fits, then spend what is left."""
    free = problem.cheapest(0.0)
    if problem.nbytes(free) <= limit:
        return problem.solution(free, problem.total(free))
    low, high = 0.0, _high_price(problem)
    best, bound = smallest, -np.inf
    for _ in range(_HALVINGS):
        price = (low + high) / 2 if low == 0 else float(np.sqrt(low * high))
        picks = problem.cheapest(price)
        spare = problem.nbytes(picks) - limit
        bound = max(bound, problem.total(picks) + price * spare)
        if spare > 0:
            low = price
        else:
            high = price
            best = min(best, picks, key=problem.total)
        if low > 0 and high / low < 1 + 1e-12:
            break
    return problem.solution(_fill(problem, best, limit), bound)


def _high_price(problem: Problem) -> float:
    """A price at which the smallest options win everywhere: all the cost there is, for one byte."""
    largest = problem.cost[np.isfinite(problem.cost)].max()
    return float(largest * len(problem.choices)) + 1.0


def _fill(problem: Problem, picks: Picks, limit: int) -> Picks:
    """Spend the bytes that are left: the step that saves most per byte first, while one fits."""
    picks, left = picks.copy(), limit - problem.nbytes(picks)
    units = np.arange(len(picks))
    more, rate = _steps(problem, units, picks)
    while True:
        fitting = np.where(more <= left, rate, 0.0)
        best = int(fitting.argmax())
        u, o = divmod(best, rate.shape[1])
        if fitting[u, o] <= 0:
            return picks
        left -= int(more[u, o])
        picks[u] = o
        more[u], rate[u] = (row[0] for row in _steps(problem, units[u : u + 1], picks))


def _steps(
    problem: Problem, units: Picks, picks: Picks
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each option of `units`, in its layout: bytes more than now, and cost saved per byte.

    Both `[units, O]`; the rate is 0 where nothing is saved, infinity where no byte is needed.
    """
    now = picks[units]
    more = problem.bytes[units] - problem.bytes[units, now][:, None]
    saved = problem.cost[units, now][:, None] - problem.cost[units]
    allowed = problem.layout[units] == problem.layout[units, now][:, None]
    rate = np.where(more > 0, saved / np.maximum(more, 1), np.inf)
    return more, np.where(allowed & (saved > 0), rate, 0.0)
