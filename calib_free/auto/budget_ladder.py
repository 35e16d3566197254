"""Predicted KL at a range of budgets, computed from costs that are already measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lfmc.calib_free.allocate.decision import unit_choice
from lfmc.calib_free.allocate.knapsack import min_nbytes, solve
from lfmc.calib_free.allocate.knapsack_problem import Choice
from lfmc.calib_free.allocate.uniform import formats_by_preference, nearest_formats
from lfmc.calib_free.auto.method import MatrixCosts, unit_cost
from lfmc.calib_free.grid.formats import Capabilities
from lfmc.calib_free.plan.roles import Unit, quantization_units
from lfmc.checkpoint.checkpoint import Checkpoint

STEP, HIGHEST = 0.25, 8.5  # bits per weight


@dataclass(frozen=True)
class Step:
    """The size of a plan, in bytes of everything stored, and its predicted KL in nats per token."""

    nbytes: int
    kl: float


@dataclass(frozen=True)
class Ladder:
    """Steps of methods `auto` and `uniform`, smallest size first.

    The cost of a step of `auto` exceeds the least possible cost by at most the fraction `gap`.
    """

    auto: tuple[Step, ...]
    uniform: tuple[Step, ...]
    gap: float


def compute_ladder(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    matrix_costs: Mapping[str, MatrixCosts],
    fixed_nbytes: int,
    progress: Callable[[str], None],
) -> Ladder:
    """Solve the knapsack for budgets up to 8.5 bits per weight, a quarter of a bit apart.

    This function measures nothing. `matrix_costs` contains every matrix that the target quantizes.
    `fixed_nbytes` is the size of everything that has no choice: float tensors and the graph. Steps
    of `uniform` use the formats of method `uniform`, but the grids and costs of `auto`.
    """
    units = quantization_units(checkpoint, capabilities)
    choices = [
        unit_choice(checkpoint, capabilities, unit, partial(unit_cost, matrix_costs, unit))
        for unit in units
    ]
    limits = _limits(choices, checkpoint.num_params, fixed_nbytes)
    steps: dict[int, Step] = {}
    gap = 0.0
    for limit in limits:
        progress(f"budget ladder: {8 * limit / checkpoint.num_params:.2f} bits per weight")
        solution = solve(choices, limit - fixed_nbytes)
        gap = max(gap, solution.gap)
        nbytes = solution.nbytes + fixed_nbytes
        steps[nbytes] = Step(nbytes, solution.cost)
    uniform = _uniform_steps(capabilities, units, choices, fixed_nbytes)
    return Ladder(tuple(steps.values()), tuple(s for s in uniform if s.nbytes <= limits[-1]), gap)


def _limits(choices: Sequence[Choice], num_params: int, fixed_nbytes: int) -> list[int]:
    """Return the smallest possible size in bytes, then every multiple of `STEP` above it."""
    smallest = min_nbytes(choices) + fixed_nbytes
    lowest = math.floor(8 * smallest / num_params / STEP) + 1
    above = [int(n * STEP * num_params / 8) for n in range(lowest, round(HIGHEST / STEP) + 1)]
    return [smallest, *above]


def _uniform_steps(
    capabilities: Capabilities, units: Sequence[Unit], choices: Sequence[Choice], fixed_nbytes: int
) -> list[Step]:
    """Return the steps of method `uniform`, smallest first.

    A format that is larger than a preferred one is never chosen, so it adds no step.
    """
    steps: list[Step] = []
    smallest = math.inf
    for preferred in formats_by_preference(capabilities, units):
        formats = nearest_formats(capabilities, units, preferred)
        options = [
            choice.options[capabilities.formats(unit.role).index(unit_format)]
            for unit, choice, unit_format in zip(units, choices, formats, strict=True)
        ]
        nbytes = sum(option.nbytes for option in options) + fixed_nbytes
        if nbytes < smallest:
            smallest = nbytes
            steps.append(Step(nbytes, sum(option.cost for option in options)))
    return steps[::-1]
