"""Method `auto`: the least KL that weights, and text from the model itself, can promise.

1. The model writes a little text (`lfmc.calib_free.auto.sampled_text`).
2. The Fisher information on it says what an error in each weight costs, in nats per token
   (`lfmc.calib_free.auto.sensitivity`), and which columns of a matrix its clip search must respect.
3. Rate-distortion curves say what error each format makes in each matrix
   (`lfmc.calib_free.grid.measure_distortion`).
4. A knapsack picks one format a unit (`lfmc.calib_free.allocate.knapsack`).

Steps 1 and 2 run layer by layer, with one matrix in memory at a time; step 3 needs some rows of
each matrix, and runs on any workers. What they find is kept in a cache, for the next budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from lfmc.calib_free.allocate.decision import unit_choice
from lfmc.calib_free.allocate.knapsack import solve
from lfmc.calib_free.allocate.knapsack_problem import Solution
from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.auto.sampled_text import write_texts
from lfmc.calib_free.auto.sensitivity import ROWS as INFORMED
from lfmc.calib_free.auto.sensitivity import Sensitivity, column_importance, sensitivities
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.grid.distortion_curves import ROWS, grid_for, spread
from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.grid.importance import encode
from lfmc.calib_free.grid.measure_distortion import RULE, Finding, Task, measure_task
from lfmc.calib_free.plan.roles import Unit
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.machine.cache import key_of, machine
from lfmc.machine.memory import return_freed_memory

TEXTS, LENGTH = 128, 96  # written by the model, and tokens of each
LARGE = 5 * 10**8  # parameters from which it writes less:
LARGE_TEXTS, LARGE_LENGTH = 96, 32
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
class Sample:
    """How much the model writes: `count` texts of `length` tokens.

    Every token of a text costs a pass over all weights, and every text memory in all layers, so a
    large model writes fewer and shorter ones.
    """

    count: int
    length: int

    @classmethod
    def of(cls, num_params: int) -> Sample:
        """The rule, by the number of parameters."""
        large = num_params >= LARGE
        return cls(LARGE_TEXTS, LARGE_LENGTH) if large else cls(TEXTS, LENGTH)

    def __str__(self) -> str:
        return f"{self.count} texts of {self.length} tokens"


@dataclass(frozen=True)
class Allocation:
    """A format for each unit, in order, and what was known when it was chosen."""

    formats: tuple[Format, ...]
    measured: Mapping[str, Measured]
    solution: Solution
    sample: Sample


def allocate_auto(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    limit: int,
    seed: int,
    progress: Callable[[str], None],
    resources: Resources,
) -> Allocation:
    """Formats for units `found` within `limit` bytes, all of them spent on these units.

    Raises `UnsupportedError` where the model has no start token.
    """
    measured = measure(checkpoint, capabilities, found, seed, progress, resources)
    progress("choosing formats")
    choices = [
        unit_choice(checkpoint, capabilities, unit, partial(unit_cost, measured, unit))
        for unit in found
    ]
    solution = solve(choices, limit)
    formats = tuple(
        capabilities.formats(unit.role)[pick]
        for unit, pick in zip(found, solution.picks, strict=True)
    )
    return Allocation(formats, measured, solution, Sample.of(checkpoint.num_params))


def measure(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    seed: int,
    progress: Callable[[str], None],
    resources: Resources,
) -> dict[str, Measured]:
    """Importance, costs and errors of every matrix of the units, by name."""
    options = {
        role: _options(capabilities, role) for role in dict.fromkeys(unit.role for unit in found)
    }
    roles = {name: unit.role for unit in found for name in unit.names}
    text = Sample.of(checkpoint.num_params)
    keys = {name: _key(checkpoint, name, options[role], text, seed) for name, role in roles.items()}
    findings: dict[str, Finding] = {}
    for name, key in keys.items():
        if (kept := resources.cache.get(key)) is not None:
            findings[name] = Finding(kept["importance"], kept["cost"], tuple(kept["errors"]))
    missing = [name for name in roles if name not in findings]
    if missing:
        return_freed_memory()
        decoder = StreamedDecoder(checkpoint)
        tokens = write_texts(decoder, text.count, text.length, seed, progress)
        order: list[str] = []
        tasks = _tasks(
            checkpoint,
            sensitivities(decoder, tokens, seed, progress),
            {name: options[roles[name]] for name in missing},
            order,
        )
        for index, finding in enumerate(resources.workers.map(measure_task, tasks)):
            findings[order[index]] = finding
            resources.cache.put(keys[order[index]], asdict(finding))
    measured: dict[str, Measured] = {}
    for role, own in options.items():
        measured |= _of_role([unit for unit in found if unit.role == role], own, findings)
    return measured


@dataclass(frozen=True)
class _Options:
    """What matrices of one role may become, with the grid of each format."""

    formats: tuple[Format, ...]
    grids: tuple[str, ...]
    reference: Format


def _options(capabilities: Capabilities, role: str) -> _Options:
    formats = capabilities.formats(role)
    reference = min(formats, key=lambda f: (abs(f.bits - REFERENCE_BITS), f))
    return _Options(formats, tuple(grid_for(f, capabilities) for f in formats), reference)


def _key(checkpoint: Checkpoint, name: str, options: _Options, text: Sample, seed: int) -> str:
    """Fisher information depends on all weights: the fingerprint stands for all their bytes.

    It also depends on the order of sums, which is the machine's.
    """
    formats: list[Any] = [
        [f.name, grid] for f, grid in zip(options.formats, options.grids, strict=True)
    ]
    rule = [text.count, text.length, seed, ROWS, INFORMED, machine()]
    return key_of(RULE, checkpoint.fingerprint, name, formats, options.reference.name, rule)


def _tasks(
    checkpoint: Checkpoint,
    known: Iterator[Sensitivity],
    wanted: Mapping[str, _Options],
    order: list[str],
) -> Iterator[Task]:
    """Tasks for the `wanted` of the matrices that are `known`; their names are put in `order`."""
    for own in known:
        if own.name not in wanted:
            continue
        order.append(own.name)
        options, weight = wanted[own.name], checkpoint.load(own.name)
        yield Task(
            own.name,
            encode(column_importance(own.columns)),
            weight[spread(len(weight), ROWS)],
            weight[own.rows],
            own.information,
            options.formats,
            options.grids,
            options.reference,
        )


def _of_role(
    units: Sequence[Unit], options: _Options, findings: Mapping[str, Finding]
) -> dict[str, Measured]:
    """`Measured` for the matrices of units of one role."""
    cost = _shared(units, {n: findings[n].cost for unit in units for n in unit.names})
    grids = dict(zip(options.formats, options.grids, strict=True))
    measured = {}
    for name, finding in ((n, findings[n]) for unit in units for n in unit.names):
        errors = dict(zip(options.formats, finding.errors, strict=True))
        costs = {f: cost[name] * _ratio(errors, f, options.reference) for f in options.formats}
        measured[name] = Measured(finding.importance, grids, costs, errors)
    return measured


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


def unit_cost(measured: Mapping[str, Measured], unit: Unit, f: Format) -> float:
    """What a unit costs in a format: the sum over its tensors."""
    return sum(measured[name].costs[f] for name in unit.names)
