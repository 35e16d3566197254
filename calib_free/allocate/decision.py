"""What a method decides about one tensor, and the formats that stand in for one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2

from lfmc.calib_free.allocate.knapsack_problem import Choice, Option
from lfmc.calib_free.grid.formats import Capabilities, Floats, Format
from lfmc.calib_free.plan.roles import KEPT, Unit, role
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.weight_files import TensorInfo
from lfmc.errors import UnsupportedError

LONG = 1 << 20  # columns that a palette or a whole row counts as


@dataclass(frozen=True)
class Decision:
    """How one tensor is stored and why; the fields are those of `PlanRow`.

    `error` None: to be measured from the tensor.
    """

    format: Format | Floats
    grid: str
    reason: str
    error: float | None = None
    alpha: float | None = None
    importance: str | None = None


def nearest(wanted: Format, formats: Sequence[Format]) -> Format:
    """The format closest to `wanted`: by width (the wider of two), group, symmetry, scales.

    A palette and a whole row count as very long groups.

    Raises `UnsupportedError` where the target stores no integers in this place.
    """
    if not formats:
        raise UnsupportedError("the target stores no integer format here", expected=wanted.name)
    return min(
        formats,
        key=lambda f: (
            abs(f.bits - wanted.bits),
            f.bits < wanted.bits,
            abs(log2(_length(f) / _length(wanted))),
            f.symmetric != wanted.symmetric,
            f.scale_dtype != wanted.scale_dtype,
            f,
        ),
    )


def _length(f: Format) -> int:
    return f.group if f.group > 0 else LONG


def keep(info: TensorInfo, kind: str, capabilities: Capabilities) -> Decision:
    """A tensor as floats: in its own dtype where the target has it, else in float32."""
    own = str(info.dtype).removeprefix("torch.")
    reason = KEPT.get(kind, "kept: as stored")
    if own in capabilities.floats:
        return Decision(Floats(own), "none", reason)
    if not capabilities.floats:
        raise UnsupportedError("the target stores no floating-point tensors", where=info.name)
    dtype = "float32" if "float32" in capabilities.floats else capabilities.floats[0]
    return Decision(Floats(dtype), "none", f"{reason}; the target has no {own}")


def kept_nbytes(
    checkpoint: Checkpoint, capabilities: Capabilities, kept: dict[str, Decision]
) -> int:
    """Bytes of the tensors that stay floats, every copy counted."""
    total = 0
    for name, made in kept.items():
        shape = checkpoint.tensors[name].shape
        total += capabilities.copies(role(name, shape)) * made.format.nbytes(shape)
    return total


def unit_choice(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    unit: Unit,
    cost: Callable[[Format], float] = lambda f: 0.0,
) -> Choice:
    """The formats of a unit as options, in the target's order, with their bytes and their cost."""
    options = tuple(
        Option(cost(f), unit_nbytes(checkpoint, unit, f), (f.group, f.symmetric, f.scale_dtype))
        for f in capabilities.formats(unit.role)
    )
    bundled = capabilities.expert_layer_shares_group and unit.experts is not None
    return Choice(options, unit.experts if bundled else None)


def unit_nbytes(checkpoint: Checkpoint, unit: Unit, number_format: Format) -> int:
    """Bytes of all tensors of a unit in one format, every copy counted."""
    shapes = (checkpoint.tensors[name].shape for name in unit.names)
    return unit.copies * sum(map(number_format.nbytes, shapes))
