"""From a checkpoint, a target's capabilities and a budget to a bit plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lfmc.calib_free.allocate.budget import Budget
from lfmc.calib_free.allocate.decision import Decision, keep, kept_nbytes, unit_choice
from lfmc.calib_free.allocate.knapsack import smallest
from lfmc.calib_free.allocate.resources import ALONE, Resources
from lfmc.calib_free.allocate.uniform import allocate_uniform, allocate_width
from lfmc.calib_free.alphaq.allocation import AlphaQOptions
from lfmc.calib_free.alphaq.method import allocate_paper
from lfmc.calib_free.auto.method import Allocation, allocate_auto
from lfmc.calib_free.fit.fit import Effort, fit_plan, require_effort
from lfmc.calib_free.grid.distortion_curves import ROWS, curves, spread
from lfmc.calib_free.grid.formats import Capabilities, Floats
from lfmc.calib_free.plan.bit_plan import VERSION, BitPlan, PlanRow
from lfmc.calib_free.plan.channel_gains import input_importance
from lfmc.calib_free.plan.roles import Unit, role, units
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError, UnsupportedError

__all__ = ["DEFAULT_BITS_PER_WEIGHT", "METHODS", "Budget", "Effort", "make_plan"]

METHODS = ("auto", "alphaq", "uniform", "none", "2", "3", "4", "6", "8")
BUDGETED = ("auto", "alphaq", "uniform")  # these take the default budget where none is given
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
    observe: Callable[[Allocation], None] = lambda made: None,
    resources: Resources = ALONE,
) -> BitPlan:
    """A plan for every stored tensor, made from the checkpoint alone.

    `budget` None means 4.5 bits per weight for "auto", "alphaq" and "uniform", and no limit for
    the others. `seed` drives the sampled text of "auto" and of the fitting that `effort` may ask
    for, with any method that quantizes; `alphaq` are the knobs of "alphaq"; `target` is only a
    name in the plan. `progress` is told each step. The same arguments on the same machine give
    the same plan, where no minutes bound the effort. `observe` is given what "auto" measured, and
    is not called by the other methods, which measure no costs. `resources` are the workers and the
    cache of the measuring of "auto" and "alphaq"; neither changes a plan.

    Raises `InputError` for an unknown method, knobs of another one, or a budget below the smallest
    possible, which it names, and `UnsupportedError` for what the target or this machine can't do.
    """
    require_effort(checkpoint, method, effort)
    if method not in METHODS:
        raise InputError("there is no such method", expected=", ".join(METHODS), got=repr(method))
    if alphaq is not None and method != "alphaq":
        raise InputError("AlphaQ's options are for method 'alphaq'", got=f"method '{method}'")
    if budget is None and method in BUDGETED:
        budget = Budget(bits_per_weight=DEFAULT_BITS_PER_WEIGHT)
    limit = None if budget is None else budget.limit(checkpoint.num_params)
    found = [] if method == "none" else units(checkpoint, capabilities)
    _require_formats(capabilities, found)
    decided = _kept(checkpoint, capabilities, found)
    left = None
    if limit is not None:
        left = limit - capabilities.graph_nbytes - kept_nbytes(checkpoint, capabilities, decided)
    if limit is not None and left is not None:
        _require_room(checkpoint, capabilities, found, limit, left)
    tell = progress or (lambda message: None)
    predicted = None
    if method == "auto":
        more, predicted = _auto(
            checkpoint, capabilities, found, left or 0, seed, tell, observe, resources
        )
    elif method == "alphaq":
        knobs, device = alphaq or AlphaQOptions(), effort.device
        more = allocate_paper(
            checkpoint, capabilities, found, left or 0, knobs, tell, resources, device
        )
    elif method == "uniform":
        more = allocate_uniform(checkpoint, capabilities, found, left or 0)
    elif method == "none":
        more = {}
    else:
        more = allocate_width(checkpoint, capabilities, found, int(method), left)
    tell("measuring errors")
    rows = _rows(checkpoint, capabilities, {**decided, **more})
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
        predicted_kl=predicted,
        rows=rows,
    )
    if effort.level == "fast":
        return plan
    return fit_plan(checkpoint, plan, effort, tell)


def _require_formats(capabilities: Capabilities, found: Sequence[Unit]) -> None:
    for unit in found:
        if not capabilities.formats(unit.role):
            raise UnsupportedError(
                f"the target stores no integer format for {unit.role} weights",
                where=unit.names[0],
                expected="floats only: --bits none",
            )


def _kept(
    checkpoint: Checkpoint, capabilities: Capabilities, found: Sequence[Unit]
) -> dict[str, Decision]:
    """Decisions for every tensor that no unit holds."""
    quantized = {name for unit in found for name in unit.names}
    return {
        name: keep(info, role(name, info.shape), capabilities)
        for name, info in checkpoint.tensors.items()
        if name not in quantized
    }


def _require_room(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    limit: int,
    left: int,
) -> None:
    """Raise `InputError`, with the smallest possible size, where nothing fits the limit."""
    least = smallest([unit_choice(checkpoint, capabilities, unit) for unit in found])
    if least > left:
        size = limit - left + least
        params = checkpoint.num_params
        raise InputError(
            "the budget is below the smallest possible size",
            expected=f"at least {8 * size / params:.4f} bits per weight, {size} bytes",
            got=f"{8 * limit / params:.4f} bits per weight, {limit} bytes",
            todo="raise the budget" if found else "choose a method that quantizes",
        )


def _auto(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    left: int,
    seed: int,
    progress: Callable[[str], None],
    observe: Callable[[Allocation], None],
    resources: Resources,
) -> tuple[dict[str, Decision], float]:
    """Decisions of `auto`, and the KL that it expects."""
    made = allocate_auto(checkpoint, capabilities, found, left, seed, progress, resources)
    observe(made)
    decisions = {}
    for unit, chosen in zip(found, made.formats, strict=True):
        for name in unit.names:
            known = made.measured[name]
            reason = f"auto: {known.costs[chosen]:.2e} nats of the predicted KL, {made.sample}"
            decisions[name] = Decision(
                chosen,
                known.grids[chosen],
                reason,
                error=known.errors[chosen],
                importance=known.importance,
            )
    return decisions, made.solution.cost


def _rows(
    checkpoint: Checkpoint, capabilities: Capabilities, decisions: Mapping[str, Decision]
) -> tuple[PlanRow, ...]:
    rows = []
    for name, info in checkpoint.tensors.items():
        made, own = decisions[name], role(name, info.shape)
        error = _error(checkpoint, name, made) if made.error is None else made.error
        rows.append(
            PlanRow(
                name=name,
                shape=info.shape,
                role=own,
                format=made.format.name,
                grid=made.grid,
                nbytes=capabilities.copies(own) * made.format.nbytes(info.shape),
                reason=made.reason,
                error=float(f"{error:.6g}"),
                alpha=made.alpha,
                importance=made.importance,
            )
        )
    return tuple(rows)


def _error(checkpoint: Checkpoint, name: str, made: Decision) -> float:
    """Predicted squared error over energy, from a few rows; 0 for floats."""
    if isinstance(made.format, Floats):
        return 0.0
    weight = checkpoint.load(name)
    rows = {name: weight[spread(len(weight), ROWS)]}
    importance = None if made.grid == "minmax" else input_importance(checkpoint, name)
    measured = curves(rows, {name: importance}, [made.format], {made.format: made.grid})
    return measured[name][made.format]
