"""Solves the knapsack's 0/1 program with HiGHS (`scipy.optimize.milp`), without its output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from scipy.optimize import (  # type: ignore[import-untyped]
    Bounds,
    LinearConstraint,
    milp,
)
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]

from lfmc.calib_free.allocate.knapsack_problem import Problem, Solution

MILP_NODES = 2_000  # a limit in nodes, not in seconds: every machine returns the same solution
GAP = 1e-6  # relative; a solution this close to the bound is not improved further


def solve_milp(problem: Problem, start: Solution, limit: int) -> Solution:
    """Solve the 0/1 program; return `start` if HiGHS finds nothing better within its node limit."""
    columns: list[tuple[int, int]] = []
    rows: list[tuple[int, int, float]] = []
    lower: list[float] = []
    switches = sum(len(layouts) for layouts in problem.bundles)  # one 0/1 column per layout
    column, switch = switches, 0
    for layouts in problem.bundles:
        bundle_row = len(lower)
        lower.append(1.0)  # exactly one layout per bundle
        for options_by_unit in layouts:
            rows.append((bundle_row, switch, 1.0))
            for unit, options in options_by_unit.items():
                unit_row = len(lower)
                lower.append(0.0)  # and one option per unit, of that layout
                rows.append((unit_row, switch, -1.0))
                for option in options:
                    rows.append((unit_row, column, 1.0))
                    columns.append((unit, option))
                    column += 1
            switch += 1
    scale = max(start.cost, 1e-300)
    cost = np.array(
        [0.0] * switches + [problem.cost[unit, option] / scale for unit, option in columns]
    )
    nbytes = np.array([0.0] * switches + [problem.bytes[unit, option] for unit, option in columns])
    row_indices, column_indices, coefficients = zip(*rows, strict=True)
    equalities = coo_matrix(
        (coefficients, (row_indices, column_indices)), shape=(len(lower), column)
    ).tocsr()
    with silence_solver():
        result = milp(
            cost,
            integrality=np.ones(column),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(equalities, lower, lower),
                LinearConstraint(nbytes[None, :] / limit, -np.inf, 1.0),
            ],
            options={"mip_rel_gap": GAP, "node_limit": MILP_NODES},
        )
    if result.x is None:
        return start
    picks = np.array(start.picks)
    for (unit, option), value in zip(columns, result.x[switches:], strict=True):
        if value > 0.5:
            picks[unit] = option
    bound = start.bound
    if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        bound = max(bound, float(result.mip_dual_bound) * scale)
    solution = problem.solution(picks, bound)
    if solution.nbytes > limit or solution.cost >= start.cost:
        return replace(start, bound=bound)
    return solution


@contextmanager
def silence_solver() -> Iterator[None]:
    """Discard everything that is written to file descriptor 1 within the context.

    HiGHS 1.12 in scipy 1.17 writes a debugging line ("HighsMipSolverData::...") directly to this
    descriptor, not through Python's stdout, for any value of `disp`. lfmc writes only results to
    stdout, and messages for the user to stderr.
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
