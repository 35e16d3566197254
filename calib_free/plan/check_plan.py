"""Checks that a plan, perhaps edited by hand, is valid for a checkpoint and a target."""

from __future__ import annotations

from collections import Counter

from lfmc.calib_free.grid.formats import Capabilities, Floats, Format, parse_format
from lfmc.calib_free.grid.grid_search import GRIDS, PALETTE
from lfmc.calib_free.grid.importance import decode_importance
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.calib_free.plan.roles import Unit, quantization_units, tensor_role
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError

FLOAT_GRIDS: tuple[str, ...] = ("none",)


def check_plan(plan: BitPlan, checkpoint: Checkpoint, capabilities: Capabilities) -> None:
    """Raise `InputError`, naming the row, at the first error.

    The checks run in this order: fingerprint and size of the checkpoint, the set of tensors, each
    row by itself, tensors that must share a format, and the total against the limit.
    """
    if plan.fingerprint != checkpoint.fingerprint:
        raise InputError(
            "the plan was made for another checkpoint",
            where="fingerprint",
            expected=checkpoint.fingerprint,
            got=plan.fingerprint,
            todo="make a new plan for this checkpoint",
        )
    _check_equal("num_params", checkpoint.num_params, plan.num_params)
    if plan.graph_nbytes < 0:
        raise _disagreement("graph_nbytes", "0 or more", plan.graph_nbytes)
    _check_names(plan, checkpoint)
    for row in plan.rows:
        _check_row(row, checkpoint, capabilities)
    units = quantization_units(checkpoint, capabilities)
    for unit in units:
        _check_unit(plan, unit)
    if capabilities.expert_layer_shares_group:
        _check_expert_layers(plan, units)
    # An exported plan stores the size of its graph; after an edit, the graph may be larger.
    graph_nbytes = max(plan.graph_nbytes, capabilities.graph_nbytes)
    nbytes = plan.nbytes - plan.graph_nbytes + graph_nbytes
    if plan.limit_nbytes is not None and nbytes > plan.limit_nbytes:
        raise InputError(
            "the plan takes more bytes than its own limit",
            where="limit_nbytes",
            expected=f"at most {plan.limit_nbytes} bytes",
            got=f"{nbytes} bytes",
            todo="give a row fewer bits, or raise limit_nbytes",
        )


def _check_equal(where: str, expected: object, got: object) -> None:
    if expected != got:
        raise _disagreement(where, expected, got)


def _disagreement(where: str, expected: object, got: object) -> InputError:
    return InputError(
        "the plan disagrees with the checkpoint or the target",
        where=where,
        expected=expected,
        got=got,
    )


def _check_names(plan: BitPlan, checkpoint: Checkpoint) -> None:
    counts = Counter(row.name for row in plan.rows)
    for name in counts:
        if name not in checkpoint.tensors:
            raise InputError(f"the plan has a row for an unknown tensor '{name}'", where=name)
    for name in checkpoint.tensors:
        if counts[name] != 1:
            raise InputError(
                f"tensor '{name}' must have exactly one row in the plan",
                where=name,
                got=f"{counts[name]} rows",
            )


def _check_row(row: PlanRow, checkpoint: Checkpoint, capabilities: Capabilities) -> None:
    info = checkpoint.tensors[row.name]
    _check_equal(f"{row.name}, shape", list(info.shape), list(row.shape))
    _check_equal(f"{row.name}, role", tensor_role(row.name, info.shape), row.role)
    try:
        number_format = parse_format(row.format)
    except InputError as error:
        raise InputError(
            "the format of a row can't be read",
            where=row.name,
            expected=error.expected,
            got=row.format,
        ) from error
    allowed = [f.name for f in capabilities.formats(row.role)]
    if isinstance(number_format, Floats):
        supported, grids = number_format.dtype in capabilities.floats, FLOAT_GRIDS
    else:
        supported = row.format in allowed
        grids = tuple(g for g in GRIDS if g != "signed" or capabilities.negative_scales)
        if number_format.palette:
            grids = (PALETTE,)
    if not supported:
        raise InputError(
            f"the target can't store tensor '{row.name}' as {row.format}",
            where=row.name,
            expected=", ".join([*allowed, *capabilities.floats]),
            got=row.format,
        )
    if row.digest is not None:
        grids = ("fitted",)
    if row.grid not in grids:
        raise InputError(
            "the grid of a row does not match its format",
            where=row.name,
            expected=", ".join(grids),
            got=row.grid,
        )
    if (
        row.importance is not None
        and len(decode_importance(row.importance, row.name)) != row.shape[-1]
    ):
        raise InputError(
            "a row does not have one importance letter per column",
            where=row.name,
            expected=row.shape[-1],
            got=len(row.importance),
        )
    nbytes = number_format.nbytes(row.shape)
    _check_equal(f"{row.name}, nbytes", nbytes, row.nbytes)


def _check_unit(plan: BitPlan, unit: Unit) -> None:
    rows = [plan.row(name) for name in unit.names]
    for row in rows[1:]:
        if row.format != rows[0].format:
            raise InputError(
                "tensors that the target stores together have different formats",
                where=f"{rows[0].name} and {row.name}",
                expected=rows[0].format,
                got=row.format,
                todo="use the same format for both",
            )


def _check_expert_layers(plan: BitPlan, units: list[Unit]) -> None:
    first_rows: dict[str, PlanRow] = {}
    for unit in units:
        if unit.experts is None:
            continue
        row = plan.row(unit.names[0])
        first_row = first_rows.setdefault(unit.experts, row)
        if _layout(row.format) != _layout(first_row.format):
            raise InputError(
                "experts of one layer differ in more than their bit widths",
                where=f"{first_row.name} and {row.name}",
                expected=f"group, symmetry and scales of {first_row.format}",
                got=row.format,
            )


def _layout(name: str) -> object:
    number_format = parse_format(name)
    if isinstance(number_format, Format):
        return (number_format.group, number_format.symmetric, number_format.scale_dtype)
    return number_format
