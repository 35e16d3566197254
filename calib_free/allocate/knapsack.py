"""Solves the multiple-choice knapsack: one option per unit, least total cost, within a byte limit.

`solve` first minimizes the Lagrangian `sum(cost + price * nbytes)`: for a given price the units are
independent, and the best dual value is a lower bound on the cost of any solution (Everett 1963;
Sinha & Zoltners 1979). The remaining bytes are spent greedily. If the program is of moderate size
and a gap remains, HiGHS (`scipy.optimize.milp`) closes the gap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lfmc.calib_free.allocate.highs import GAP, solve_milp
from lfmc.calib_free.allocate.knapsack_problem import Choice, Picks, Problem, Solution
from lfmc.errors import InputError

MILP_BINARIES = 20_000  # above this only the Lagrangian is used: its gap shrinks with size
_BISECTIONS = 100


def min_nbytes(choices: Sequence[Choice]) -> int:
    """Return the bytes of the smallest solution."""
    problem = Problem(choices)
    return problem.nbytes(problem.cheapest(np.inf))


def solve(choices: Sequence[Choice], limit: int) -> Solution:
    """Pick one option per choice, with the least total cost within `limit` bytes.

    Raises `InputError` if even the smallest options exceed the limit.
    """
    problem = Problem(choices)
    picks = problem.cheapest(np.inf)
    if problem.nbytes(picks) > limit:
        raise InputError(
            "no choice of formats fits the budget",
            expected=f"at least {problem.nbytes(picks)} bytes",
            got=f"{limit} bytes",
        )
    best = _solve_lagrangian(problem, picks, limit)
    if best.gap > GAP and problem.size <= MILP_BINARIES:
        best = solve_milp(problem, best, limit)
    return best


def _solve_lagrangian(problem: Problem, smallest: Picks, limit: int) -> Solution:
    """Bisect for the lowest price that fits the limit, then spend the remaining bytes."""
    unpriced = problem.cheapest(0.0)
    if problem.nbytes(unpriced) <= limit:
        return problem.solution(unpriced, problem.total(unpriced))
    low, high = 0.0, _high_price(problem)
    best, bound = smallest, -np.inf
    for _ in range(_BISECTIONS):
        price = (low + high) / 2 if low == 0 else float(np.sqrt(low * high))
        picks = problem.cheapest(price)
        excess = problem.nbytes(picks) - limit
        bound = max(bound, problem.total(picks) + price * excess)
        if excess > 0:
            low = price
        else:
            high = price
            best = min(best, picks, key=problem.total)
        if low > 0 and high / low < 1 + 1e-12:
            break
    return problem.solution(_spend_rest(problem, best, limit), bound)


def _high_price(problem: Problem) -> float:
    """Return a price so high that one byte costs more than any options: the smallest ones win."""
    largest = problem.cost[np.isfinite(problem.cost)].max()
    return float(largest * len(problem.choices)) + 1.0


def _spend_rest(problem: Problem, picks: Picks, limit: int) -> Picks:
    """Spend the remaining bytes greedily: the step that saves most cost per byte comes first."""
    picks, remaining = picks.copy(), limit - problem.nbytes(picks)
    units = np.arange(len(picks))
    extra_bytes, rate = _upgrade_steps(problem, units, picks)
    while True:
        fitting = np.where(extra_bytes <= remaining, rate, 0.0)
        best = int(fitting.argmax())
        unit, option = divmod(best, rate.shape[1])
        if fitting[unit, option] <= 0:
            return picks
        remaining -= int(extra_bytes[unit, option])
        picks[unit] = option
        steps = _upgrade_steps(problem, units[unit : unit + 1], picks)
        extra_bytes[unit], rate[unit] = (row[0] for row in steps)


def _upgrade_steps(
    problem: Problem, units: Picks, picks: Picks
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the extra bytes of a change to each option of `units`, and the saved cost per byte.

    Both are `[units, O]`. The saved cost per byte is 0 for an option of another layout or without a
    saving, and infinity if the option needs no extra bytes.
    """
    current = picks[units]
    extra_bytes = problem.bytes[units] - problem.bytes[units, current][:, None]
    saving = problem.cost[units, current][:, None] - problem.cost[units]
    same_layout = problem.layout[units] == problem.layout[units, current][:, None]
    rate = np.where(extra_bytes > 0, saving / np.maximum(extra_bytes, 1), np.inf)
    return extra_bytes, np.where(same_layout & (saving > 0), rate, 0.0)
