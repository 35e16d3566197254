"""Make a bit plan from a checkpoint, a target's capabilities and a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lfmc.calib_free.allocate.budget import Budget
from lfmc.calib_free.allocate.decision import Decision, float_decision, float_nbytes, unit_choice
from lfmc.calib_free.allocate.knapsack import min_nbytes
from lfmc.calib_free.allocate.resources import LOCAL, Resources
from lfmc.calib_free.allocate.uniform import (
    allocate_uniform,
    allocate_width,
    smallest_uniform_nbytes,
)
from lfmc.calib_free.alphaq.allocation import AlphaQOptions
from lfmc.calib_free.alphaq.method import allocate_alphaq
from lfmc.calib_free.auto.method import Allocation, allocate_auto
from lfmc.calib_free.fit.fit import Effort, fit_plan, require_effort
from lfmc.calib_free.grid.distortion_curves import ROWS, measure_curves, spaced_rows
from lfmc.calib_free.grid.formats import Capabilities, Floats
from lfmc.calib_free.plan.bit_plan import VERSION, BitPlan, PlanRow
from lfmc.calib_free.plan.channel_gains import input_importance
from lfmc.calib_free.plan.roles import Unit, quantization_units, tensor_role
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError, UnsupportedError

__all__ = ["DEFAULT_BITS_PER_WEIGHT", "METHODS", "Budget", "Effort", "make_plan"]

METHODS = ("auto", "alphaq", "uniform", "none", "2", "3", "4", "6", "8")
BUDGETED = ("auto", "alphaq", "uniform")  # these use the default budget if no budget is passed
DEFAULT_BITS_PER_WEIGHT = 4.5
FAST = Effort()


def make_plan(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    method: str,
    budget: Budget | None,
    *,
    target: str = "generic",
    seed: int = 0,
    effort: Effort = FAST,
    alphaq: AlphaQOptions | None = None,
    progress: Callable[[str], None] | None = None,
    observe: Callable[[Allocation], None] = lambda allocation: None,
    resources: Resources = LOCAL,
) -> BitPlan:
    """Make a plan for every tensor of the checkpoint, from the checkpoint alone.

    `budget` None means no limit for single widths and "none". For "auto", "alphaq" and "uniform" it
    means 4.5 bits per weight, or the smallest possible size where the target needs more. `seed`
    determines the sampled text of "auto" and of the fitting by `effort`, which works with any
    method that quantizes. `alphaq` are the options of method "alphaq". `target` is only stored in
    the plan. `progress` receives a message at each step. `observe` receives the allocation of
    "auto"; other methods measure no costs and do not call it. `resources` are the workers and the
    cache for the measurements of "auto" and "alphaq"; they do not change the plan. The same
    arguments on the same machine return the same plan, unless `effort` limits the minutes.

    Raises `InputError` for an unknown method, for options of another method, and for a budget below
    the smallest possible size, which the error states. Raises `UnsupportedError` if the target or
    this machine does not support the method or the effort.
    """
    require_effort(checkpoint, method, effort)
    if method not in METHODS:
        raise InputError("there is no such method", expected=", ".join(METHODS), got=repr(method))
    if alphaq is not None and method != "alphaq":
        raise InputError("AlphaQ's options are for method 'alphaq'", got=f"method '{method}'")
    report = progress or (lambda message: None)
    units = [] if method == "none" else quantization_units(checkpoint, capabilities)
    _require_formats(capabilities, units)
    float_decisions = _float_decisions(checkpoint, capabilities, units)
    fixed = capabilities.graph_nbytes + float_nbytes(checkpoint, float_decisions)
    limit, units_limit = None, None
    if budget is not None or method in BUDGETED:
        smallest = min_nbytes([unit_choice(checkpoint, capabilities, unit) for unit in units])
        if budget is None and method == "uniform":
            smallest = smallest_uniform_nbytes(checkpoint, capabilities, units)
        limit = _limit(checkpoint, budget, fixed + smallest, bool(units))
        units_limit = limit - fixed
    predicted_kl = None
    if method == "auto":
        decisions, predicted_kl = _auto_decisions(
            checkpoint, capabilities, units, units_limit or 0, seed, report, observe, resources
        )
    elif method == "alphaq":
        options, device = alphaq or AlphaQOptions(), effort.device
        decisions = allocate_alphaq(
            checkpoint, capabilities, units, units_limit or 0, options, report, resources, device
        )
    elif method == "uniform":
        decisions = allocate_uniform(checkpoint, capabilities, units, units_limit or 0)
    elif method == "none":
        decisions = {}
    else:
        decisions = allocate_width(checkpoint, capabilities, units, int(method), units_limit)
    report("measuring errors")
    rows = _plan_rows(checkpoint, capabilities, {**float_decisions, **decisions})
    plan = BitPlan(
        version=VERSION,
        fingerprint=checkpoint.fingerprint,
        target=target,
        method=method,
        effort=effort.level,
        seed=seed,
        limit_nbytes=limit,
        graph_nbytes=capabilities.graph_nbytes,
        num_params=checkpoint.num_params,
        predicted_kl=predicted_kl,
        rows=rows,
    )
    if effort.level == "fast":
        return plan
    return fit_plan(checkpoint, plan, effort, report)


def _require_formats(capabilities: Capabilities, units: Sequence[Unit]) -> None:
    """Raise `UnsupportedError` if the target has no integer format for a unit."""
    for unit in units:
        if not capabilities.formats(unit.role):
            raise UnsupportedError(
                f"the target stores no integer format for {unit.role} weights",
                where=unit.names[0],
                expected="floats only: --bits none",
            )


def _float_decisions(
    checkpoint: Checkpoint, capabilities: Capabilities, units: Sequence[Unit]
) -> dict[str, Decision]:
    """Return the decisions for all tensors outside the units, which stay floating point."""
    quantized = {name for unit in units for name in unit.names}
    return {
        name: float_decision(info, tensor_role(name, info.shape), capabilities)
        for name, info in checkpoint.tensors.items()
        if name not in quantized
    }


def _limit(checkpoint: Checkpoint, budget: Budget | None, smallest: int, quantizes: bool) -> int:
    """Return the limit in bytes of a budget, or of the default budget.

    Raises `InputError`, which states `smallest`, the smallest possible size in bytes, if no plan
    fits the budget. The default budget is raised to `smallest` instead.
    """
    params = checkpoint.num_params
    if budget is None:
        return max(smallest, Budget(bits_per_weight=DEFAULT_BITS_PER_WEIGHT).limit(params))
    limit = budget.limit(params)
    if limit < smallest:
        raise InputError(
            "the budget is below the smallest possible size",
            expected=f"at least {8 * smallest / params:.4f} bits per weight, {smallest} bytes",
            got=f"{8 * limit / params:.4f} bits per weight, {limit} bytes",
            todo="raise the budget" if quantizes else "choose a method that quantizes",
        )
    return limit


def _auto_decisions(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    units: Sequence[Unit],
    limit: int,
    seed: int,
    progress: Callable[[str], None],
    observe: Callable[[Allocation], None],
    resources: Resources,
) -> tuple[dict[str, Decision], float]:
    """Return the decisions of method `auto`, and the predicted KL."""
    allocation = allocate_auto(checkpoint, capabilities, units, limit, seed, progress, resources)
    observe(allocation)
    decisions = {}
    for unit, unit_format in zip(units, allocation.formats, strict=True):
        for name in unit.names:
            matrix = allocation.matrix_costs[name]
            cost = matrix.costs[unit_format]
            decisions[name] = Decision(
                unit_format,
                matrix.grids[unit_format],
                f"auto: {cost:.2e} nats of the predicted KL, {allocation.sample}",
                error=matrix.errors[unit_format],
                importance=matrix.importance,
            )
    return decisions, allocation.solution.cost


def _plan_rows(
    checkpoint: Checkpoint, capabilities: Capabilities, decisions: Mapping[str, Decision]
) -> tuple[PlanRow, ...]:
    rows = []
    for name, info in checkpoint.tensors.items():
        decision, role = decisions[name], tensor_role(name, info.shape)
        error = decision.error
        if error is None:
            error = _measure_error(checkpoint, name, decision)
        rows.append(
            PlanRow(
                name=name,
                shape=info.shape,
                role=role,
                format=decision.format.name,
                grid=decision.grid,
                nbytes=decision.format.nbytes(info.shape),
                reason=decision.reason,
                error=float(f"{error:.6g}"),
                alpha=decision.alpha,
                importance=decision.importance,
            )
        )
    return tuple(rows)


def _measure_error(checkpoint: Checkpoint, name: str, decision: Decision) -> float:
    """Return the squared error over energy, measured on a few rows; 0 for floats."""
    if isinstance(decision.format, Floats):
        return 0.0
    weight = checkpoint.load(name)
    rows = {name: weight[spaced_rows(len(weight), ROWS)]}
    importance = None if decision.grid == "minmax" else input_importance(checkpoint, name)
    grids = {decision.format: decision.grid}
    curves = measure_curves(rows, {name: importance}, [decision.format], grids)
    return curves[name][decision.format]
