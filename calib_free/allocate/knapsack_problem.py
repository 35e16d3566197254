"""The multiple-choice knapsack as data: options, choices, their arrays, and a solution."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfmc.errors import InputError

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


class Problem:
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
