"""The multiple-choice knapsack problem as data: options, choices, their arrays, and a solution."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfmc.errors import InputError

Picks = NDArray[np.int64]  # [U]: the index of the picked option of each choice


@dataclass(frozen=True)
class Option:
    """One way to store a unit: its cost (any unit, at least 0), its bytes, and its layout."""

    cost: float
    nbytes: int
    layout: Hashable = None


@dataclass(frozen=True)
class Choice:
    """The options of one unit; all choices with the same `bundle` must pick the same layout."""

    options: tuple[Option, ...]
    bundle: Hashable = None


@dataclass(frozen=True)
class Solution:
    """`picks[i]` is the option of choice i; `bound` is a lower bound on every solution's cost."""

    picks: tuple[int, ...]
    cost: float
    nbytes: int
    bound: float

    @property
    def gap(self) -> float:
        """The largest possible relative distance of the cost from the optimum."""
        return max(0.0, (self.cost - self.bound) / max(abs(self.cost), 1e-300))


class Problem:
    """The choices as arrays `[U, O]` over units and options, padded with infinite costs.

    A layout is common to a bundle if every member has an option of that layout. A choice without a
    bundle is a bundle of one choice with one layout. A cell is a unit in a common layout of its
    bundle. The cells of a layout are contiguous, and so are the layouts of a bundle.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = choices
        self.size = sum(len(choice.options) for choice in choices)
        shape = (len(choices), max((len(choice.options) for choice in choices), default=1))
        self.cost, self.bytes = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
        self.layout = np.full(shape, -1)  # index of the common layout that an option belongs to
        for unit, choice in enumerate(choices):
            self.cost[unit, : len(choice.options)] = [option.cost for option in choice.options]
            self.bytes[unit, : len(choice.options)] = [option.nbytes for option in choice.options]
        self.bundles = list(_common_layouts(choices))
        common_layouts = [layout for bundle in self.bundles for layout in bundle]
        cells = [(unit, options) for layout in common_layouts for unit, options in layout.items()]
        for index, layout in enumerate(common_layouts):
            for unit, options in layout.items():
                self.layout[unit, options] = index
        self._unit = np.array([unit for unit, _ in cells], dtype=np.int64)
        most_options = max((len(options) for _, options in cells), default=1)
        self._option = np.zeros((len(cells), most_options), int)
        for index, (_, options) in enumerate(cells):
            self._option[index] = options[0]  # padding repeats the first option
            self._option[index, : len(options)] = options
        self._layout_start = np.cumsum([0, *map(len, common_layouts)])[:-1]
        self._bundle_start = np.cumsum([0, *map(len, self.bundles)])[:-1]
        self._layout_of_cell = np.repeat(
            np.arange(len(common_layouts)), [len(layout) for layout in common_layouts]
        )

    def cheapest(self, price: float) -> Picks:
        """Return each bundle's best options at a price per byte.

        At an infinite price these are the smallest options.
        """
        picks = np.zeros(len(self.choices), dtype=np.int64)
        if not len(self._unit):
            return picks
        weighted = self.bytes.astype(float) if price == np.inf else self.cost + price * self.bytes
        cell_costs = weighted[self._unit[:, None], self._option]  # (cells, options of a layout)
        best_option = cell_costs.argmin(axis=1)
        cell_minima = cell_costs[np.arange(len(best_option)), best_option]
        totals = np.add.reduceat(cell_minima, self._layout_start)
        bundle_minima = np.minimum.reduceat(totals, self._bundle_start)
        layouts = np.diff([*self._bundle_start, len(totals)])
        winners = np.flatnonzero(totals == np.repeat(bundle_minima, layouts))
        bundles = np.repeat(np.arange(len(layouts)), layouts)[winners]
        # Keep one layout per bundle, even in a tie.
        winning_layouts = winners[np.unique(bundles, return_index=True)[1]]
        selected = np.isin(self._layout_of_cell, winning_layouts)
        picks[self._unit[selected]] = self._option[selected, best_option[selected]]
        return picks

    def nbytes(self, picks: Picks) -> int:
        return int(self.bytes[np.arange(len(picks)), picks].sum())

    def total(self, picks: Picks) -> float:
        return math.fsum(self.cost[np.arange(len(picks)), picks])

    def solution(self, picks: Picks, bound: float) -> Solution:
        return Solution(tuple(picks.tolist()), self.total(picks), self.nbytes(picks), bound)


def _common_layouts(choices: Sequence[Choice]) -> Iterator[list[dict[int, list[int]]]]:
    """Yield the common layouts of each bundle, each as option indices by unit.

    Raises `InputError` for a bundle without a common layout.
    """
    bundles: dict[Hashable, dict[Hashable, dict[int, list[int]]]] = {}
    for unit, choice in enumerate(choices):
        key: Hashable = ("alone", unit) if choice.bundle is None else ("bundle", choice.bundle)
        layouts = bundles.setdefault(key, {})
        for index, option in enumerate(choice.options):
            layout = None if choice.bundle is None else option.layout
            layouts.setdefault(layout, {}).setdefault(unit, []).append(index)
    for key, layouts in bundles.items():
        members: set[int] = set().union(*layouts.values())
        common_layouts = [options for options in layouts.values() if len(options) == len(members)]
        if not common_layouts:
            raise InputError("no layout is common to all choices of a bundle", where=key)
        yield common_layouts
