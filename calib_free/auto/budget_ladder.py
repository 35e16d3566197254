"""What every budget would buy: predicted KL against size, from costs that are already measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lfmc.calib_free.allocate.decision import unit_choice
from lfmc.calib_free.allocate.knapsack import smallest, solve
from lfmc.calib_free.allocate.knapsack_problem import Choice
from lfmc.calib_free.allocate.uniform import alike, formats_by_preference
from lfmc.calib_free.auto.method import Measured, unit_cost
from lfmc.calib_free.grid.formats import Capabilities
from lfmc.calib_free.plan.roles import Unit, units
from lfmc.checkpoint.checkpoint import Checkpoint

STEP, HIGHEST = 0.25, 8.5  # bits per weight


@dataclass(frozen=True)
class Step:
    """One size, in bytes of everything stored, and its predicted KL in nats per token."""

    nbytes: int
    kl: float


@dataclass(frozen=True)
class Ladder:
    """Sizes from the smallest up: the least predicted KL, and that of one format everywhere.

    No step of `auto` is more than the share `gap` above the least possible cost.
    """

    auto: tuple[Step, ...]
    uniform: tuple[Step, ...]
    gap: float


def ladder(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    measured: Mapping[str, Measured],
    fixed: int,
    progress: Callable[[str], None],
) -> Ladder:
    """Solve the knapsack for budgets up to 8.5 bits per weight, a quarter of a bit apart.

    Nothing is measured: costs are those of `measured`, for every matrix that the target quantizes.
    `fixed` are the bytes that no choice changes: floats and graph. `uniform` takes its formats by
    the rule of its method, with the rounding, and so the costs, of `auto`.
    """
    found = units(checkpoint, capabilities)
    choices = [
        unit_choice(checkpoint, capabilities, unit, partial(unit_cost, measured, unit))
        for unit in found
    ]
    limits = _limits(choices, checkpoint.num_params, fixed)
    steps: dict[int, Step] = {}
    gap = 0.0
    for limit in limits:
        progress(f"the ladder: {8 * limit / checkpoint.num_params:.2f} bits per weight")
        solution = solve(choices, limit - fixed)
        gap = max(gap, solution.gap)
        steps[solution.nbytes + fixed] = Step(solution.nbytes + fixed, solution.cost)
    same = _uniform(capabilities, found, choices, fixed)
    return Ladder(tuple(steps.values()), tuple(s for s in same if s.nbytes <= limits[-1]), gap)


def _limits(choices: Sequence[Choice], num_params: int, fixed: int) -> list[int]:
    """The smallest size in bytes, then every multiple of `STEP` above it."""
    least = smallest(choices) + fixed
    lowest = math.floor(8 * least / num_params / STEP) + 1
    above = [int(n * STEP * num_params / 8) for n in range(lowest, round(HIGHEST / STEP) + 1)]
    return [least, *above]


def _uniform(
    capabilities: Capabilities, found: Sequence[Unit], choices: Sequence[Choice], fixed: int
) -> list[Step]:
    """The steps of method `uniform`, smallest first.

    A format that is larger than one which `uniform` prefers is never taken, so it is no step.
    """
    steps: list[Step] = []
    least = math.inf
    for wanted in formats_by_preference(capabilities, found):
        chosen = [
            choice.options[capabilities.formats(unit.role).index(own)]
            for unit, choice, own in zip(
                found, choices, alike(capabilities, found, wanted), strict=True
            )
        ]
        nbytes = sum(option.nbytes for option in chosen) + fixed
        if nbytes < least:
            least = nbytes
            steps.append(Step(nbytes, sum(option.cost for option in chosen)))
    return steps[::-1]
