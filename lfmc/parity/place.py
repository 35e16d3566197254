"""The first place at which two sides part: what it is called, by how much, and both tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

ROWS, COLUMNS = 4, 6  # of the tensors that are shown


@dataclass(frozen=True)
class Corner:
    """A piece of both tensors around the worst element; `row` and `column` are where it begins."""

    row: int
    column: int
    ours: tuple[tuple[float, ...], ...]
    reference: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Place:
    """The first operator, layer or stored tensor that differs from what it is compared with.

    `part` is "embedding", "layer 3", "head", "stored tensor" or "file"; `name` a node of the
    graph, a module of the decoder, or a stored tensor, and `weights` the checkpoint's tensors that
    it reads. `difference` is over the largest value of the reference. `token` is the first token
    (for a stored tensor the row) that differs, in call `call` of `case`. `agrees` is the last thing
    before it that was compared and is the same; what lies between and can't be shown is `hidden`.
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
        """The layer's index, for a place that lies in one."""
        kind, _, index = self.part.partition(" ")
        return int(index) if kind == "layer" else None

    @property
    def where(self) -> str:
        """The place in one line."""
        return f"{self.part}, {self.operator} ({self.name})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no words for values that are not finite: they are strings."""
        found: dict[str, Any] = _plain({**asdict(self), "layer": self.layer, "where": self.where})
        return found


@dataclass(frozen=True)
class Parting:
    """Where two tensors `[rows, columns]` part: the largest difference over the largest value of
    the reference, the first row beyond the tolerance, and that row's worst column."""

    difference: float
    row: int
    column: int
    ours: Tensor
    reference: Tensor

    def corner(self) -> Corner:
        row = max(0, min(self.row - 1, len(self.ours) - ROWS))
        column = max(0, min(self.column - COLUMNS // 2, self.ours.shape[1] - COLUMNS))
        ours, reference = (
            tuple(
                tuple(map(float, line[column : column + COLUMNS]))
                for line in tensor[row : row + ROWS].float()
            )
            for tensor in (self.ours, self.reference)
        )
        return Corner(row, column, ours, reference)


def parting(ours: Tensor, reference: Tensor, tolerance: float) -> Parting | None:
    """Compare two tensors of one shape, their last dim as columns; None where they agree.

    Whatever is not finite on our side differs.
    """
    left, right = (
        value.detach().reshape(-1, value.shape[-1]).double() for value in (ours, reference)
    )
    scale = max(float(right.abs().max()), 1e-30)
    off = ((left - right).abs() / scale).nan_to_num(nan=math.inf)
    beyond = (off > tolerance).any(1).nonzero()
    if not len(beyond):
        return None
    row = int(beyond[0])
    return Parting(float(off.max()), row, int(off[row].argmax()), left, right)


def stored_place(name: str, part: str, found: Tensor, planned: Tensor) -> Place:
    """The place of a stored tensor that is not the plan's: its first element that differs."""
    same = found.shape == planned.shape and found.dtype == planned.dtype
    if not same:
        note = f"{found.dtype} {list(found.shape)}, the plan has {planned.dtype} "
        note = (note + f"{list(planned.shape)}").replace("torch.", "")
        return Place(3, "stored tensor", part, name, math.inf, 0.0, weights=(name,), note=note)
    ours, reference = (
        (value.reshape(len(value), -1) if value.dim() > 1 else value.reshape(1, -1)).double()
        for value in (found, planned)
    )
    parted = parting(ours, reference, 0.0)
    wrong = int((ours != reference).sum())
    note = f"{wrong:,} of {ours.numel():,} values differ"
    if parted is None:  # only a NaN equals nothing, itself included
        return Place(3, "stored tensor", part, name, math.nan, 0.0, weights=(name,), note=note)
    return Place(
        3,
        "stored tensor",
        part,
        name,
        parted.difference,
        0.0,
        parted.corner(),
        (name,),
        token=parted.row,
        note=note,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
