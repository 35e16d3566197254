"""The knapsack's 0/1 program, by HiGHS (`scipy.optimize.milp`), and what keeps that quiet."""

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

MILP_NODES = 2_000  # a limit in nodes, not in seconds: the same answer on every machine
GAP = 1e-6  # relative; a solution this close to the bound is not improved further


def exact(problem: Problem, start: Solution, limit: int) -> Solution:
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
