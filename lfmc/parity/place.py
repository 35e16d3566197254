"""The first place where an artifact differs from its reference: its name, size and values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

ROWS, COLUMNS = 4, 6  # size of the printed part of both tensors


@dataclass(frozen=True)
class Corner:
    """A part of both tensors around the worst element, which starts at `row` and `column`."""

    row: int
    column: int
    ours: tuple[tuple[float, ...], ...]
    reference: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Place:
    """The first operator, module or stored tensor that differs from its reference.

    `part` is "embedding", "layer 3", "head", "stored tensor" or "file". `name` is a node of the
    graph, a module of the decoder, or a stored tensor; `weights` are the checkpoint's tensors that
    it reads. `difference` is divided by the largest value of the reference. `token` is the first
    token (for a stored tensor the row) that differs, in call `call` of `case`. `agrees` is the last
    value before it that was compared and is equal. `hidden` are the values in between that could
    not be compared.
    """

    rung: int
    part: str
    operator: str
    name: str
    difference: float
    tolerance: float
    corner: Corner | None = None
    weights: tuple[str, ...] = ()
    case: str | None = None
    call: int | None = None
    token: int | None = None
    agrees: str | None = None
    hidden: tuple[str, ...] = ()
    note: str | None = None

    @property
    def layer(self) -> int | None:
        """The index of the layer; None for a place outside of the layers."""
        kind, _, index = self.part.partition(" ")
        return int(index) if kind == "layer" else None

    @property
    def where(self) -> str:
        """The place in one line."""
        return f"{self.part}, {self.operator} ({self.name})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; values that are not finite become strings."""
        fields = {**asdict(self), "layer": self.layer, "where": self.where}
        values: dict[str, Any] = _replace_nonfinite(fields)
        return values


@dataclass(frozen=True)
class Mismatch:
    """Where two tensors `[rows, columns]` differ.

    `difference` is the largest difference over the largest value of the reference, `row` the first
    row beyond the tolerance, and `column` the worst column of that row.
    """

    difference: float
    row: int
    column: int
    actual: Tensor
    reference: Tensor

    def corner(self) -> Corner:
        row = max(0, min(self.row - 1, len(self.actual) - ROWS))
        column = max(0, min(self.column - COLUMNS // 2, self.actual.shape[1] - COLUMNS))
        actual, reference = (
            tuple(
                tuple(map(float, line[column : column + COLUMNS]))
                for line in tensor[row : row + ROWS].float()
            )
            for tensor in (self.actual, self.reference)
        )
        return Corner(row, column, actual, reference)


def find_mismatch(actual: Tensor, reference: Tensor, tolerance: float) -> Mismatch | None:
    """Compare two tensors of one shape, with the last dim as columns; None if they agree.

    A value of `actual` that is not finite is a mismatch.
    """
    actual_rows, reference_rows = (
        value.detach().reshape(-1, value.shape[-1]).double() for value in (actual, reference)
    )
    scale = max(float(reference_rows.abs().max()), 1e-30)
    errors = ((actual_rows - reference_rows).abs() / scale).nan_to_num(nan=math.inf)
    wrong_rows = (errors > tolerance).any(1).nonzero()
    if not len(wrong_rows):
        return None
    row = int(wrong_rows[0])
    column = int(errors[row].argmax())
    return Mismatch(float(errors.max()), row, column, actual_rows, reference_rows)


def stored_tensor_place(name: str, part: str, stored: Tensor, planned: Tensor) -> Place:
    """Return the place of a stored tensor that differs from the plan: its first wrong element."""
    if stored.shape != planned.shape or stored.dtype != planned.dtype:
        note = f"{stored.dtype} {list(stored.shape)}, the plan has {planned.dtype} "
        note = (note + f"{list(planned.shape)}").replace("torch.", "")
        return Place(3, "stored tensor", part, name, math.inf, 0.0, weights=(name,), note=note)
    actual, reference = (
        (value.reshape(len(value), -1) if value.dim() > 1 else value.reshape(1, -1)).double()
        for value in (stored, planned)
    )
    mismatch = find_mismatch(actual, reference, 0.0)
    num_wrong = int((actual != reference).sum())
    note = f"{num_wrong:,} of {actual.numel():,} values differ"
    if mismatch is None:  # equal except for NaN, which is not equal to itself
        return Place(3, "stored tensor", part, name, math.nan, 0.0, weights=(name,), note=note)
    return Place(
        3,
        "stored tensor",
        part,
        name,
        mismatch.difference,
        0.0,
        mismatch.corner(),
        (name,),
        token=mismatch.row,
        note=note,
    )


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_nonfinite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
