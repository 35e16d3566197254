"""The multiple-choice knapsack: one option a unit, least total cost, never over the byte limit.

`solve` first follows the Lagrangian `min sum(cost + price * nbytes)`: for every price each unit
decides alone, and the best dual value bounds what any solution can reach (Everett 1963; Sinha &
Zoltners 1979). What that leaves of the limit is spent greedily. Where the program is of moderate
size and a gap remains, HiGHS (`scipy.optimize.milp`) closes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import (  # type: ignore[import-untyped]
    Bounds,
    LinearConstraint,
    milp,
)
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]

from lfmc.errors import InputError

MILP_BINARIES = 20_000  # above this the Lagrangian answer, whose gap shrinks with size, stands
MILP_NODES = 2_000  # a limit in nodes, not in seconds: the same answer on every machine
GAP = 1e-6  # relative; a solution this close to the bound is not improved further
_HALVINGS = 100


@dataclass(frozen=True)
class Option:
    """One way to store a unit: its cost (any unit, at least 0), its bytes, and its layout."""

    cost: float
    nbytes: int
    layout: Hashable = None


@dataclass(frozen=True)
class Choice:
    """The options of one unit; choices of one `bundle` must take options of one layout."""

    options: tuple[Option, ...]
    bundle: Hashable = None


@dataclass(frozen=True)
class Solution:
    """`picks[i]` is the option of choice i; `bound` is a cost that no solution can go below."""

    picks: tuple[int, ...]
    cost: float
    nbytes: int
    bound: float

    @property
    def gap(self) -> float:
        """How far, relatively, the cost may be from the least one."""
        return max(0.0, (self.cost - self.bound) / max(abs(self.cost), 1e-300))


@contextmanager
def solver_silent() -> Iterator[None]:
    """Drop what is written to file descriptor 1 meanwhile.

    HiGHS 1.12 in scipy 1.17 leaves a debugging line on stdout ("HighsMipSolverData::..."), past
    Python and whatever `disp` says; stdout is for results, and stderr for what users can use.
    """
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def smallest(choices: Sequence[Choice]) -> int:
    """The fewest bytes that any solution takes."""
    picks = _Problem(choices).cheapest(np.inf)
    return sum(c.options[p].nbytes for c, p in zip(choices, picks, strict=True))


def solve(choices: Sequence[Choice], limit: int) -> Solution:
    """One option a choice, of least total cost within `limit` bytes.

    Raises `InputError` where even the smallest options take more.
    """
    problem = _Problem(choices)
    picks = problem.cheapest(np.inf)
    if problem.nbytes(picks) > limit:
        raise InputError(
            "no choice of formats fits the budget",
            expected=f"at least {problem.nbytes(picks)} bytes",
            got=f"{limit} bytes",
        )
    best = _lagrangian(problem, picks, limit)
    if best.gap > GAP and problem.size <= MILP_BINARIES:
        best = _exact(problem, best, limit)
    return best


class _Problem:
    """The choices as padded arrays `[U, O]`, and the units of each bundle."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = choices
        self.size = sum(len(c.options) for c in choices)
        shape = (len(choices), max((len(c.options) for c in choices), default=1))
        self.cost, self.bytes = np.full(shape, np.inf), np.full(shape, np.inf)
        self.bundles: dict[Hashable, dict[Hashable, dict[int, list[int]]]] = {}
        for u, choice in enumerate(choices):
            key: Hashable = ("alone", u) if choice.bundle is None else ("bundle", choice.bundle)
            layouts = self.bundles.setdefault(key, {})
            for o, option in enumerate(choice.options):
                self.cost[u, o], self.bytes[u, o] = option.cost, option.nbytes
                layout = None if choice.bundle is None else option.layout
                layouts.setdefault(layout, {}).setdefault(u, []).append(o)
        for key, layouts in self.bundles.items():
            members = set().union(*layouts.values())
            self.bundles[key] = {k: v for k, v in layouts.items() if set(v) == members}

    def cheapest(self, price: float) -> list[int]:
        """Each bundle's best options at a price per byte; at an infinite one the smallest."""
        finite = np.isfinite(self.bytes)
        weighed = np.full(self.cost.shape, np.inf)
        weighed[finite] = self.bytes[finite]
        if price != np.inf:
            weighed[finite] = self.cost[finite] + price * self.bytes[finite]
        picks = [0] * len(self.choices)
        for layouts in self.bundles.values():
            totals = []
            for options in layouts.values():
                found = {u: min(own, key=lambda o: weighed[u, o]) for u, own in options.items()}
                totals.append((sum(weighed[u, o] for u, o in found.items()), found))
            for u, o in min(totals, key=lambda t: t[0])[1].items():
                picks[u] = o
        return picks

    def nbytes(self, picks: Sequence[int]) -> int:
        return sum(c.options[p].nbytes for c, p in zip(self.choices, picks, strict=True))

    def total(self, picks: Sequence[int]) -> float:
        return float(sum(c.options[p].cost for c, p in zip(self.choices, picks, strict=True)))

    def solution(self, picks: Sequence[int], bound: float) -> Solution:
        return Solution(tuple(picks), self.total(picks), self.nbytes(picks), bound)


def _lagrangian(problem: _Problem, smallest: list[int], limit: int) -> Solution:
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


def _high_price(problem: _Problem) -> float:
    """A price at which the smallest options win everywhere: all the cost there is, for one byte."""
    finite = np.isfinite(problem.cost)
    return float(problem.cost[finite].max() * len(problem.choices)) + 1.0


def _fill(problem: _Problem, picks: list[int], limit: int) -> list[int]:
    """Spend the bytes that are left: the step that saves most per byte first, while one fits."""
    picks, left = list(picks), limit - problem.nbytes(picks)
    while True:
        best: tuple[float, int, int] | None = None
        for u, choice in enumerate(problem.choices):
            now = choice.options[picks[u]]
            for o, option in enumerate(choice.options):
                more, saved = option.nbytes - now.nbytes, now.cost - option.cost
                if more > left or saved <= 0:
                    continue
                if choice.bundle is not None and option.layout != now.layout:
                    continue
                rate = saved / more if more > 0 else np.inf
                if best is None or rate > best[0]:
                    best = (rate, u, o)
        if best is None:
            return picks
        _, u, o = best
        left -= problem.choices[u].options[o].nbytes - problem.choices[u].options[picks[u]].nbytes
        picks[u] = o


def _exact(problem: _Problem, start: Solution, limit: int) -> Solution:
    """The 0/1 program by HiGHS; `start` where it finds nothing better within its node limit."""
    columns: list[tuple[int, int]] = []
    rows: list[tuple[int, int, float]] = []
    lower: list[float] = []
    switches = sum(len(layouts) for layouts in problem.bundles.values())
    column, switch = switches, 0
    for layouts in problem.bundles.values():
        one = len(lower)
        lower.append(1.0)  # exactly one layout a bundle
        for options in layouts.values():
            rows.append((one, switch, 1.0))
            for u, own in options.items():
                same = len(lower)
                lower.append(0.0)  # and one option a unit, of that layout
                rows.append((same, switch, -1.0))
                for o in own:
                    rows.append((same, column, 1.0))
                    columns.append((u, o))
                    column += 1
            switch += 1
    scale = max(problem.total(start.picks), 1e-300)
    cost = np.array([0.0] * switches + [problem.cost[u, o] / scale for u, o in columns])
    nbytes = np.array([0.0] * switches + [problem.bytes[u, o] for u, o in columns])
    i, j, v = zip(*rows, strict=True)
    equal = coo_matrix((v, (i, j)), shape=(len(lower), column)).tocsr()
    with solver_silent():
        result = milp(
            cost,
            integrality=np.ones(column),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(equal, lower, lower),
                LinearConstraint(nbytes[None, :] / limit, -np.inf, 1.0),
            ],
            options={"mip_rel_gap": GAP, "node_limit": MILP_NODES},
        )
    if result.x is None:
        return start
    picks = list(start.picks)
    for (u, o), value in zip(columns, result.x[switches:], strict=True):
        if value > 0.5:
            picks[u] = o
    bound = start.bound
    if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        bound = max(bound, float(result.mip_dual_bound) * scale)
    found = problem.solution(picks, bound)
    if found.nbytes > limit or found.cost >= start.cost:
        return problem.solution(start.picks, bound)
    return found
