"""The multiple-choice knapsack: one option a unit, least total cost, never over the byte limit.

`solve` first follows the Lagrangian `min sum(cost + price * nbytes)`: for every price each unit
decides alone, and the best dual value bounds what any solution can reach (Everett 1963; Sinha &
Zoltners 1979). What that leaves of the limit is spent greedily. Where the program is of moderate
size and a gap remains, HiGHS (`scipy.optimize.milp`) closes it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
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

Picks = NDArray[np.int64]  # [U]: which option of each choice


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
    problem = _Problem(choices)
    return problem.nbytes(problem.cheapest(np.inf))


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
    """The choices as arrays: `[U, O]` over units and options, padded with infinite costs.

    A layout is open to a bundle where every member has an option of it; a choice of no bundle is
    a bundle of its own, of one layout. A cell is a unit in an open layout of its bundle. Cells of
    a layout are neighbours, and layouts of a bundle.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = choices
        self.size = sum(len(c.options) for c in choices)
        shape = (len(choices), max((len(c.options) for c in choices), default=1))
        self.cost, self.bytes = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
        self.layout = np.full(shape, -1)  # which open layout of its bundle an option belongs to
        for u, choice in enumerate(choices):
            self.cost[u, : len(choice.options)] = [o.cost for o in choice.options]
            self.bytes[u, : len(choice.options)] = [o.nbytes for o in choice.options]
        self.bundles = list(_open_layouts(choices))
        open_layouts = [layout for bundle in self.bundles for layout in bundle]
        cells = [(u, own) for layout in open_layouts for u, own in layout.items()]
        for index, layout in enumerate(open_layouts):
            for u, own in layout.items():
                self.layout[u, own] = index
        self._unit = np.array([u for u, _ in cells], dtype=np.int64)
        self._option = np.zeros((len(cells), max((len(own) for _, own in cells), default=1)), int)
        for index, (_, own) in enumerate(cells):
            self._option[index] = own[0]  # padding repeats the first
            self._option[index, : len(own)] = own
        self._layout_start = np.cumsum([0, *map(len, open_layouts)])[:-1]
        self._bundle_start = np.cumsum([0, *map(len, self.bundles)])[:-1]
        self._layout_of_cell = np.repeat(
            np.arange(len(open_layouts)), [len(layout) for layout in open_layouts]
        )

    def cheapest(self, price: float) -> Picks:
        """Each bundle's best options at a price per byte; at an infinite one the smallest."""
        picks = np.zeros(len(self.choices), dtype=np.int64)
        if not len(self._unit):
            return picks
        weighed = self.bytes.astype(float) if price == np.inf else self.cost + price * self.bytes
        of_cell = weighed[self._unit[:, None], self._option]  # (cells, options of a layout)
        best = of_cell.argmin(axis=1)
        least = of_cell[np.arange(len(best)), best]
        totals = np.add.reduceat(least, self._layout_start)
        lowest = np.minimum.reduceat(totals, self._bundle_start)
        layouts = np.diff([*self._bundle_start, len(totals)])
        winners = np.flatnonzero(totals == np.repeat(lowest, layouts))
        bundles = np.repeat(np.arange(len(layouts)), layouts)[winners]
        first = winners[np.unique(bundles, return_index=True)[1]]  # one a bundle, ties or not
        chosen = np.isin(self._layout_of_cell, first)
        picks[self._unit[chosen]] = self._option[chosen, best[chosen]]
        return picks

    def nbytes(self, picks: Picks) -> int:
        return int(self.bytes[np.arange(len(picks)), picks].sum())

    def total(self, picks: Picks) -> float:
        return math.fsum(self.cost[np.arange(len(picks)), picks])

    def solution(self, picks: Picks, bound: float) -> Solution:
        return Solution(tuple(picks.tolist()), self.total(picks), self.nbytes(picks), bound)


def _open_layouts(choices: Sequence[Choice]) -> Iterator[list[dict[int, list[int]]]]:
    """For each bundle its open layouts, each with the options of every unit.

    Raises `InputError` for a bundle without one.
    """
    bundles: dict[Hashable, dict[Hashable, dict[int, list[int]]]] = {}
    for u, choice in enumerate(choices):
        key: Hashable = ("alone", u) if choice.bundle is None else ("bundle", choice.bundle)
        layouts = bundles.setdefault(key, {})
        for o, option in enumerate(choice.options):
            layout = None if choice.bundle is None else option.layout
            layouts.setdefault(layout, {}).setdefault(u, []).append(o)
    for key, layouts in bundles.items():
        members: set[int] = set().union(*layouts.values())
        found = [own for own in layouts.values() if len(own) == len(members)]
        if not found:
            raise InputError("no layout is open to every choice of a bundle", where=key)
        yield found


def _lagrangian(problem: _Problem, smallest: Picks, limit: int) -> Solution:
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
    largest = problem.cost[np.isfinite(problem.cost)].max()
    return float(largest * len(problem.choices)) + 1.0


def _fill(problem: _Problem, picks: Picks, limit: int) -> Picks:
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
    problem: _Problem, units: Picks, picks: Picks
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


def _exact(problem: _Problem, start: Solution, limit: int) -> Solution:
    """The 0/1 program by HiGHS; `start` where it finds nothing better within its node limit."""
    columns: list[tuple[int, int]] = []
    rows: list[tuple[int, int, float]] = []
    lower: list[float] = []
    switches = sum(len(layouts) for layouts in problem.bundles)
    column, switch = switches, 0
    for layouts in problem.bundles:
        one = len(lower)
        lower.append(1.0)  # exactly one layout a bundle
        for options in layouts:
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
    scale = max(start.cost, 1e-300)
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
    picks = np.array(start.picks)
    for (u, o), value in zip(columns, result.x[switches:], strict=True):
        if value > 0.5:
            picks[u] = o
    bound = start.bound
    if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        bound = max(bound, float(result.mip_dual_bound) * scale)
    found = problem.solution(picks, bound)
    if found.nbytes > limit or found.cost >= start.cost:
        return replace(start, bound=bound)
    return found
