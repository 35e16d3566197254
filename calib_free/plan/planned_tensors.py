"""Tensors as a plan stores them: computed from the checkpoint, or read if they were fitted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Floats, Format, parse_format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.calib_free.grid.importance import decode_importance
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.calib_free.plan.channel_gains import input_importance
from lfmc.calib_free.plan.fitted_tensors import Parts, digest_parts, packed_from_parts
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.weight_files import LazyTensors
from lfmc.errors import InputError


def quantize_tensor(checkpoint: Checkpoint, plan: BitPlan, name: str) -> PackedTensor:
    """Return the codes of a quantized row, computed from the checkpoint and the row; deterministic.

    Raises `InputError` for a row that stores floats (use `float_tensor`), and if fitted codes are
    missing or do not match the row's digest.
    """
    row = plan.row(name)
    number_format = parse_format(row.format)
    if not isinstance(number_format, Format):
        raise InputError(f"tensor '{name}' is stored as {row.format}, not as codes", where=name)
    if row.digest is not None:
        parts = _fitted_parts(plan, row)
        try:
            return packed_from_parts(parts, number_format, (row.shape[0], row.shape[1]))
        except (ValueError, KeyError) as error:
            raise InputError(
                "a fitted tensor was fitted in another format",
                where=name,
                expected=row.format,
                got=error,
                todo="leave the rows of fitted tensors as they are",
            ) from error
    importance = _column_importance(checkpoint, row)
    return quantize(checkpoint.load(name), number_format, importance, row.grid)


def _fitted_parts(plan: BitPlan, row: PlanRow) -> Parts:
    """Return the stored parts of a fitted row, and check their digest."""
    if row.name not in plan.fitted:
        raise InputError(f"the fitted values of tensor '{row.name}' are missing", where=row.name)
    parts = plan.fitted[row.name]
    actual = digest_parts(parts)
    if actual != row.digest:
        raise InputError(
            f"the fitted values of tensor '{row.name}' are not those of the plan",
            where=row.name,
            expected=f"SHA-256 {row.digest}",
            got=actual,
            todo="make the plan again, or use the folder that was written with it",
        )
    return parts


def stored_error(
    checkpoint: Checkpoint, plan: BitPlan, name: str, stored: PackedTensor | None = None
) -> float:
    """Measure the error that a row predicts: squared error over the energy of the weights.

    Columns have the same weights as in the search for the codes. If `stored` is None, the tensor of
    the plan is measured.
    """
    if stored is None:
        stored = quantize_tensor(checkpoint, plan, name)
    weight = checkpoint.load(name).float()
    columns = _column_importance(checkpoint, plan.row(name))
    cost = torch.ones(weight.shape[1]) if columns is None else columns
    energy = float((cost * weight.square()).sum())
    error = float((cost * (stored.dequantize() - weight).square()).sum())
    return error / energy if energy else 0.0


def _column_importance(checkpoint: Checkpoint, row: PlanRow) -> Tensor | None:
    """Return the cost of an error in each column, `[K]`; None if all columns cost the same."""
    if row.grid == "minmax":
        return None  # this grid has no search
    if row.importance is not None:
        return decode_importance(row.importance, row.name)
    return input_importance(checkpoint, row.name)


def float_tensor(checkpoint: Checkpoint, plan: BitPlan, name: str) -> Tensor:
    """Return the values of a row that stores floats, in the row's dtype, rounded to nearest.

    Raises `InputError` for a quantized row, or if a value is too large for the dtype.
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
    """Return every tensor as the plan stores it, float32, computed on access.

    For `checkpoint.decoder(...)`. Nothing is cached: a tensor is quantized again on each access.
    """

    def load_dequantized(name: str) -> Tensor:
        if isinstance(parse_format(plan.row(name).format), Floats):
            return float_tensor(checkpoint, plan, name).float()
        return quantize_tensor(checkpoint, plan, name).dequantize()

    return LazyTensors((row.name for row in plan.rows), load_dequantized)
