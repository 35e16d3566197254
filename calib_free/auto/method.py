"""Method `auto`: choose formats of least predicted KL from the weights and self-generated text.

1. Sample a little text from the model (`lfmc.calib_free.auto.sampled_text`).
2. Compute the Fisher information on this text: the cost of an error in each weight, in nats per
   token, and the importance of each column in the clip search (`lfmc.calib_free.auto.sensitivity`).
3. Measure rate-distortion curves: the error of each format in each matrix
   (`lfmc.calib_free.grid.measure_distortion`).
4. Solve a knapsack for one format per unit (`lfmc.calib_free.allocate.knapsack`).

Steps 1 and 2 run layer by layer, with one matrix in memory at a time. Step 3 reads some rows of
each matrix and can run on remote workers. A cache stores the results for the next budget. It also
stores the text, hidden states and gradients of an unfinished plan, which the next call continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lfmc.calib_free.allocate.decision import unit_choice
from lfmc.calib_free.allocate.knapsack import solve
from lfmc.calib_free.allocate.knapsack_problem import Solution
from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.auto.sampled_text import sample_texts, sample_texts_with_states
from lfmc.calib_free.auto.sensitivity import ROWS as SENSITIVITY_ROWS
from lfmc.calib_free.auto.sensitivity import (
    Sensitivity,
    column_importance,
    compute_sensitivities,
    hidden_name,
)
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.grid.distortion_curves import ROWS, grid_for, spaced_rows
from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.grid.importance import encode_importance
from lfmc.calib_free.grid.measure_distortion import RULE, Distortion, Task, measure_task
from lfmc.calib_free.plan.roles import Unit
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.machine.cache import Intermediate, cache_key, numeric_environment
from lfmc.machine.memory import return_freed_memory

TEXTS, LENGTH = 128, 96  # sampled texts, and tokens of each
LARGE = 2 * 10**8  # models of at least this many parameters use fewer and shorter texts:
LARGE_TEXTS, LARGE_LENGTH = 96, 32
REFERENCE_BITS = 3  # the cost of a matrix is measured at the width nearest to this one
EXCESS = 3.0  # KL exceeds the quadratic form by this times the relative error
SHRINKAGE = 0.1  # of a matrix's cost towards the mean of its kind: the sample is finite


@dataclass(frozen=True)
class MatrixCosts:
    """The column importance of one matrix, and the grid, cost and error of each format.

    Costs are in nats per token; errors are weighted squared errors over weighted energy.
    """

    importance: str
    grids: Mapping[Format, str]
    costs: Mapping[Format, float]
    errors: Mapping[Format, float]


@dataclass(frozen=True)
class Sample:
    """The size of the sampled text: `count` texts of `length` tokens.

    Every token of a text needs a pass over all weights, and every text needs memory in all layers,
    so a large model uses fewer and shorter texts. With `has_states`, the hidden states of the
    texts are those of the sampling. This saves a forward pass, and changes the last bits of sums.
    """

    count: int
    length: int
    has_states: bool = False

    @classmethod
    def for_model(cls, num_params: int) -> Sample:
        """Return the sample size for a model of `num_params` parameters."""
        if num_params >= LARGE:
            return cls(LARGE_TEXTS, LARGE_LENGTH, has_states=True)
        return cls(TEXTS, LENGTH)

    def __str__(self) -> str:
        return f"{self.count} texts of {self.length} tokens"


@dataclass(frozen=True)
class Allocation:
    """The chosen format of each unit, in order, and the costs that the choice is based on."""

    formats: tuple[Format, ...]
    matrix_costs: Mapping[str, MatrixCosts]
    solution: Solution
    sample: Sample


def allocate_auto(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    units: Sequence[Unit],
    limit: int,
    seed: int,
    progress: Callable[[str], None],
    resources: Resources,
) -> Allocation:
    """Choose formats for `units` so that their stored tensors take at most `limit` bytes.

    Raises `UnsupportedError` if the model has no start token.
    """
    matrix_costs = measure_units(checkpoint, capabilities, units, seed, progress, resources)
    progress("choosing formats")
    choices = [
        unit_choice(checkpoint, capabilities, unit, partial(unit_cost, matrix_costs, unit))
        for unit in units
    ]
    solution = solve(choices, limit)
    formats = tuple(
        capabilities.formats(unit.role)[pick]
        for unit, pick in zip(units, solution.picks, strict=True)
    )
    return Allocation(formats, matrix_costs, solution, Sample.for_model(checkpoint.num_params))


def measure_units(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    units: Sequence[Unit],
    seed: int,
    progress: Callable[[str], None],
    resources: Resources,
) -> dict[str, MatrixCosts]:
    """Return the importance, costs and errors of every matrix of the units, by name."""
    options = {
        role: _options(capabilities, role) for role in dict.fromkeys(unit.role for unit in units)
    }
    roles = {name: unit.role for unit in units for name in unit.names}
    sample = Sample.for_model(checkpoint.num_params)
    keys = {
        name: _cache_key(checkpoint, name, options[role], sample, seed)
        for name, role in roles.items()
    }
    distortions: dict[str, Distortion] = {}
    for name, key in keys.items():
        if (entry := resources.cache.get(key)) is not None:
            errors = tuple(entry["errors"])
            distortions[name] = Distortion(entry["importance"], entry["cost"], errors)
    missing = [name for name in roles if name not in distortions]
    if missing:
        return_freed_memory()
        decoder = StreamedDecoder(checkpoint)
        stored = resources.cache.intermediate(_intermediate_key(checkpoint, sample, seed))
        tokens, hidden = _sample_text(decoder, sample, seed, progress, stored)
        missing_options = {name: options[roles[name]] for name in missing}
        layers = [unit.layer for unit in units if not missing_options.keys().isdisjoint(unit.names)]
        count = 1 + max((layer for layer in layers if layer is not None), default=-1)
        for sensitivities in compute_sensitivities(
            decoder, tokens, seed, progress, hidden=hidden, stored=stored, count=count
        ):
            task_names: list[str] = []
            tasks = _tasks(checkpoint, sensitivities, missing_options, task_names)
            for index, distortion in enumerate(resources.workers.map(measure_task, tasks)):
                distortions[task_names[index]] = distortion
                resources.cache.put(keys[task_names[index]], asdict(distortion))
        stored.delete()
    matrix_costs: dict[str, MatrixCosts] = {}
    for role, role_options in options.items():
        role_units = [unit for unit in units if unit.role == role]
        matrix_costs |= _role_costs(role_units, role_options, distortions)
    return matrix_costs


@dataclass(frozen=True)
class _Options:
    """The formats that the target supports for one role, and the grid of each format."""

    formats: tuple[Format, ...]
    grids: tuple[str, ...]
    reference: Format


def _options(capabilities: Capabilities, role: str) -> _Options:
    formats = capabilities.formats(role)
    reference = min(formats, key=lambda f: (abs(f.bits - REFERENCE_BITS), f))
    return _Options(formats, tuple(grid_for(f, capabilities) for f in formats), reference)


def _cache_key(
    checkpoint: Checkpoint, name: str, options: _Options, sample: Sample, seed: int
) -> str:
    """Return the cache key of a matrix.

    Fisher information depends on all weights, so the key contains the fingerprint of all their
    bytes. It also depends on the order of summation, which depends on the machine.
    """
    formats: list[Any] = [
        [f.name, grid] for f, grid in zip(options.formats, options.grids, strict=True)
    ]
    rule = [*_sample_rule(sample, seed), ROWS, SENSITIVITY_ROWS, numeric_environment()]
    return cache_key(RULE, checkpoint.fingerprint, name, formats, options.reference.name, rule)


def _intermediate_key(checkpoint: Checkpoint, sample: Sample, seed: int) -> str:
    """Return the key of text, hidden states and gradients, which depend on no format."""
    rule = [*_sample_rule(sample, seed), numeric_environment()]
    return cache_key(RULE, checkpoint.fingerprint, rule)


def _sample_rule(sample: Sample, seed: int) -> list[object]:
    states = ["states of the sampling"] if sample.has_states else []
    return [sample.count, sample.length, *states, seed]


def _sample_text(
    decoder: StreamedDecoder,
    sample: Sample,
    seed: int,
    progress: Callable[[str], None],
    stored: Intermediate,
) -> tuple[Tensor, list[Tensor]]:
    """Return the sampled text, and its hidden states if the sample has them, else an empty list.

    Stored text is read, and new text is stored.
    """
    names = [hidden_name(n) for n in range(decoder.config.num_layers + 1)]
    if (text := stored.load("text")) is not None:
        layers = [stored.load(name) for name in names] if sample.has_states else []
        hidden = [layer["hidden"] for layer in layers if layer is not None]
        if len(hidden) == len(layers):
            return text["tokens"], hidden
    if sample.has_states:
        tokens, hidden = sample_texts_with_states(
            decoder, sample.count, sample.length, seed, progress
        )
        for name, layer in zip(names, hidden, strict=True):
            stored.save(name, {"hidden": layer})
    else:
        tokens, hidden = sample_texts(decoder, sample.count, sample.length, seed, progress), []
    stored.save("text", {"tokens": tokens})
    return tokens, hidden


def _tasks(
    checkpoint: Checkpoint,
    sensitivities: Sequence[Sensitivity],
    options_by_name: Mapping[str, _Options],
    task_names: list[str],
) -> Iterator[Task]:
    """Yield a task for each matrix in `options_by_name`; append its name to `task_names`."""
    for sensitivity in sensitivities:
        name = sensitivity.name
        if name not in options_by_name:
            continue
        task_names.append(name)
        options, weight = options_by_name[name], checkpoint.load(name)
        yield Task(
            name,
            encode_importance(column_importance(sensitivity.columns)),
            weight[spaced_rows(len(weight), ROWS)],
            weight[sensitivity.rows],
            sensitivity.information,
            options.formats,
            options.grids,
            options.reference,
        )


def _role_costs(
    units: Sequence[Unit], options: _Options, distortions: Mapping[str, Distortion]
) -> dict[str, MatrixCosts]:
    """Return the costs of the matrices of `units`, which all have the same role."""
    cost = _shrink_to_kind_mean(
        units, {n: distortions[n].cost for unit in units for n in unit.names}
    )
    grids = dict(zip(options.formats, options.grids, strict=True))
    matrix_costs = {}
    for name, distortion in ((n, distortions[n]) for unit in units for n in unit.names):
        errors = dict(zip(options.formats, distortion.errors, strict=True))
        costs = {f: cost[name] * _cost_ratio(errors, f, options.reference) for f in options.formats}
        matrix_costs[name] = MatrixCosts(distortion.importance, grids, costs, errors)
    return matrix_costs


def _cost_ratio(errors: Mapping[Format, float], f: Format, reference: Format) -> float:
    """Return the cost of a format divided by the cost of the reference.

    Large errors (about a tenth) cost more than the quadratic form predicts.
    """
    if errors[reference] == 0:
        return float(errors[f] > 0)
    cost, base = (errors[g] * (1 + EXCESS * errors[g]) for g in (f, reference))
    return cost / base


def _shrink_to_kind_mean(units: Sequence[Unit], cost: Mapping[str, float]) -> dict[str, float]:
    """Shrink each cost a little towards the mean of its kind in its layer.

    If few of the sampled tokens choose an expert, its measured cost is too low.
    """
    kinds: dict[object, list[str]] = {}
    for unit in units:
        kinds.setdefault((unit.layer, unit.kind), []).extend(unit.names)
    means = {n: sum(cost[m] for m in names) / len(names) for names in kinds.values() for n in names}
    return {name: (1 - SHRINKAGE) * cost[name] + SHRINKAGE * means[name] for name in means}


def unit_cost(matrix_costs: Mapping[str, MatrixCosts], unit: Unit, f: Format) -> float:
    """Return the cost of a unit in a format: the sum over its tensors."""
    return sum(matrix_costs[name].costs[f] for name in unit.names)
