"""Tensors as a plan stores them: made of the checkpoint, or read where they were fitted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Floats, Format, parse_format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.calib_free.grid.importance import decode
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.calib_free.plan.channel_gains import input_importance
from lfmc.calib_free.plan.fitted_tensors import Parts, digest, packed_of
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.weight_files import LazyTensors
from lfmc.errors import InputError


def quantize_tensor(checkpoint: Checkpoint, plan: BitPlan, name: str) -> PackedTensor:
    """The codes of a quantized row: the same ones every time, from the checkpoint and the row.

    Raises `InputError` for a row that stores floats (those are `float_tensor`'s), and where fitted
    codes are missing or not those that the row's digest names.
    """
    row = plan.row(name)
    number_format = parse_format(row.format)
    if not isinstance(number_format, Format):
        raise InputError(f"tensor '{name}' is stored as {row.format}, not as codes", where=name)
    if row.digest is not None:
        parts = _fitted_parts(plan, row)
        try:
            return packed_of(parts, number_format, (row.shape[0], row.shape[1]))
        except (ValueError, KeyError) as error:
            raise InputError(
                "a fitted tensor was fitted in another format",
                where=name,
                expected=row.format,
                got=error,
                todo="leave the rows of fitted tensors as they are",
            ) from error
    importance = _importance(checkpoint, row)
    return quantize(checkpoint.load(name).float(), number_format, importance, row.grid)


def _fitted_parts(plan: BitPlan, row: PlanRow) -> Parts:
    """The stored parts of a fitted row, after a look at their digest."""
    if row.name not in plan.fitted:
        raise InputError(f"the fitted values of tensor '{row.name}' are missing", where=row.name)
    parts = plan.fitted[row.name]
    found = digest(parts)
    if found != row.digest:
        raise InputError(
            f"the fitted values of tensor '{row.name}' are not those of the plan",
            where=row.name,
            expected=f"SHA-256 {row.digest}",
            got=found,
            todo="make the plan again, or take the folder that was written with it",
        )
    return parts


def stored_error(
    checkpoint: Checkpoint, plan: BitPlan, name: str, stored: PackedTensor | None = None
) -> float:
    """What a row's `error` predicts, measured: squared error of `stored` over the weights' energy.

    Columns weigh what they weigh in the search for the codes. `stored` None: what the plan stores.
    """
    if stored is None:
        stored = quantize_tensor(checkpoint, plan, name)
    weight = checkpoint.load(name).float()
    columns = _importance(checkpoint, plan.row(name))
    cost = torch.ones(weight.shape[1]) if columns is None else columns
    energy = float((cost * weight.square()).sum())
    left = float((cost * (stored.dequantize() - weight).square()).sum())
    return left / energy if energy else 0.0


def _importance(checkpoint: Checkpoint, row: PlanRow) -> Tensor | None:
    """What an error in each column costs, `[K]`; None where all cost the same."""
    if row.grid == "minmax":
        return None  # nothing was searched
    if row.importance is not None:
        return decode(row.importance, row.name)
    return input_importance(checkpoint, row.name)


def float_tensor(checkpoint: Checkpoint, plan: BitPlan, name: str) -> Tensor:
    """The values of a row that stores floats, in the row's dtype, rounded to nearest.

    Raises `InputError` for a quantized row, or where a value is too large for the dtype.
    """
    row = plan.row(name)
    number_format = parse_format(row.format)
    if not isinstance(number_format, Floats):
        raise InputError(f"tensor '{name}' is stored as {row.format}, not as floats", where=name)
    if row.digest is not None:
        values = _fitted_parts(plan, row).get("values")
        if values is None or values.dtype != getattr(torch, number_format.dtype):
            raise InputError("a fitted tensor was fitted in another format", where=name)
        return values
    stored = checkpoint.load(name).to(getattr(torch, number_format.dtype))
    if not bool(torch.isfinite(stored).all()):
        raise InputError(
            f"tensor '{name}' has values too large for {number_format.dtype}",
            where=name,
            todo="store it as float32",
        )
    return stored


def dequantized_weights(checkpoint: Checkpoint, plan: BitPlan) -> Mapping[str, Tensor]:
    """Every tensor as the plan stores it, float32, made when asked for: `checkpoint.decoder(...)`.

    Nothing is cached: a tensor that is asked for twice is quantized twice.
    """

    def make(name: str) -> Tensor:
        if isinstance(parse_format(plan.row(name).format), Floats):
            return float_tensor(checkpoint, plan, name).float()
        return quantize_tensor(checkpoint, plan, name).dequantize()

    return LazyTensors((row.name for row in plan.rows), make)
