"""Method `auto`: the least KL that weights, and text from the model itself, can promise.

1. The model writes a little text (`lfmc.calib_free.sample`).
2. The Fisher information on it says what an error in each weight costs, in nats per token
   (`lfmc.calib_free.sensitivity`), and which columns of a matrix its clip search must respect.
3. Rate-distortion curves say what error each format makes in each matrix.
4. A knapsack picks one format a unit (`lfmc.calib_free.solve`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lfmc.calib_free.curves import ROWS, curves, grid_for, spread
from lfmc.calib_free.decision import unit_choice
from lfmc.calib_free.formats import Capabilities, Format
from lfmc.calib_free.grids import quantize
from lfmc.calib_free.importance import decode, encode
from lfmc.calib_free.roles import Unit
from lfmc.calib_free.sample import sample
from lfmc.calib_free.sensitivity import BYTES_PER_PARAM, column_importance, fisher_diagonal
from lfmc.calib_free.solve import Solution, solve
from lfmc.checkpoint import Checkpoint
from lfmc.memory import require_memory

TEXTS, LENGTH = 32, 96  # sampled: about 3,000 tokens
REFERENCE_BITS = 3  # the width at which a matrix's cost is measured in full
EXCESS = 3.0  # KL outgrows the quadratic form by this times the relative error
SHARED = 0.1  # of a unit's sensitivity that it takes from its kind: a sample is finite


@dataclass(frozen=True)
class Measured:
    """What is known of one matrix: its columns' importance, and each format's grid, cost, error.

    Costs are in nats per token; errors are weighted squared errors over weighted energy.
    """

    importance: str
    grids: Mapping[Format, str]
    costs: Mapping[Format, float]
    errors: Mapping[Format, float]


@dataclass(frozen=True)
class Allocation:
    """A format for each unit, in order, and what was known when it was chosen."""

    formats: tuple[Format, ...]
    measured: Mapping[str, Measured]
    solution: Solution


def allocate_auto(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    limit: int,
    seed: int,
    progress: Callable[[str], None],
) -> Allocation:
    """Formats for units `found` within `limit` bytes, all of them spent on these units.

    Raises `UnsupportedError` where the model does not fit in memory or has no start token.
    """
    require_memory(
        checkpoint,
        BYTES_PER_PARAM,
        "method 'auto'",
        "use --bits alphaq, uniform or a plain width, or a larger machine",
    )
    measured = measure(checkpoint, capabilities, found, seed, progress)
    progress("choosing formats")
    choices = [
        unit_choice(checkpoint, capabilities, unit, partial(_unit_cost, measured, unit))
        for unit in found
    ]
    solution = solve(choices, limit)
    formats = tuple(
        capabilities.formats(unit.role)[pick]
        for unit, pick in zip(found, solution.picks, strict=True)
    )
    return Allocation(formats, measured, solution)


def measure(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, Measured]:
    """Importance, costs and errors of every matrix of the units, by name."""
    decoder = checkpoint.decoder()
    progress("sampling text from the model")
    tokens = sample(decoder, TEXTS, LENGTH, seed)
    names = [name for unit in found for name in unit.names]
    fisher = fisher_diagonal(decoder, names, tokens, progress)
    weights = {name: decoder.get_parameter(name) for name in names}
    letters = {name: encode(column_importance(fisher[name])) for name in names}
    measured: dict[str, Measured] = {}
    for role in dict.fromkeys(unit.role for unit in found):
        progress(f"error curves: {role}")
        units = [unit for unit in found if unit.role == role]
        measured |= _measure_role(units, capabilities, weights, fisher, letters)
    return measured


def _measure_role(
    units: Sequence[Unit],
    capabilities: Capabilities,
    weights: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    letters: Mapping[str, str],
) -> dict[str, Measured]:
    """`Measured` for the matrices of units of one role."""
    formats = capabilities.formats(units[0].role)
    grids = {f: grid_for(f, capabilities) for f in formats}
    reference = min(formats, key=lambda f: (abs(f.bits - REFERENCE_BITS), f))
    names = [name for unit in units for name in unit.names]
    columns = {name: decode(letters[name], name) for name in names}
    rows = {name: weights[name][spread(len(weights[name]), ROWS)] for name in names}
    errors = curves(rows, columns, formats, grids)
    cost = {}
    for name in names:
        packed = quantize(weights[name], reference, columns[name], grids[reference])
        wrong = (packed.dequantize() - weights[name]).square_()
        cost[name] = 0.5 * float((wrong * fisher[name]).sum(dtype=torch.float64))
    cost = _shared(units, cost)
    return {
        name: Measured(
            letters[name],
            grids,
            {f: cost[name] * _ratio(errors[name], f, reference) for f in formats},
            errors[name],
        )
        for name in names
    }


def _ratio(errors: Mapping[Format, float], f: Format, reference: Format) -> float:
    """How much more a format costs than the reference; errors of a tenth cost more than squares."""
    if errors[reference] == 0:
        return float(errors[f] > 0)
    cost, base = (errors[g] * (1 + EXCESS * errors[g]) for g in (f, reference))
    return cost / base


def _shared(units: Sequence[Unit], cost: Mapping[str, float]) -> dict[str, float]:
    """Costs drawn a little towards the mean of their kind: experts that few tokens chose."""
    kinds: dict[object, list[str]] = {}
    for unit in units:
        kinds.setdefault((unit.layer, unit.kind), []).extend(unit.names)
    means = {n: sum(cost[m] for m in names) / len(names) for names in kinds.values() for n in names}
    return {name: (1 - SHARED) * cost[name] + SHARED * means[name] for name in means}


def _unit_cost(measured: Mapping[str, Measured], unit: Unit, f: Format) -> float:
    return sum(measured[name].costs[f] for name in unit.names)
