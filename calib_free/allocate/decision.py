"""The decision about one tensor, its nearest supported format, and sizes in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log2

from lfmc.calib_free.allocate.knapsack_problem import Choice, Option
from lfmc.calib_free.grid.formats import Capabilities, Floats, Format
from lfmc.calib_free.plan.roles import FLOAT_ROLES, Unit
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.weight_files import TensorInfo
from lfmc.errors import UnsupportedError

LONG_GROUP = 1 << 20  # palettes and whole rows are compared as groups of this size


@dataclass(frozen=True)
class Decision:
    """The format of one tensor and the reason for it; the fields are those of `PlanRow`.

    If `error` is None, the error is measured later from the tensor.
    """

    format: Format | Floats
    grid: str
    reason: str
    error: float | None = None
    alpha: float | None = None
    importance: str | None = None


def nearest_format(ideal: Format, formats: Sequence[Format]) -> Format:
    """Return the format nearest to `ideal`, by bit width, group size, symmetry and scale dtype.

    Of two equally near bit widths, the wider one wins. A palette and a whole row count as very
    long groups.

    Raises `UnsupportedError` if `formats` is empty.
    """
    if not formats:
        raise UnsupportedError(
            "the target supports no integer format for this tensor", expected=ideal.name
        )
    return min(
        formats,
        key=lambda candidate: (
            abs(candidate.bits - ideal.bits),
            candidate.bits < ideal.bits,
            abs(log2(_group_length(candidate) / _group_length(ideal))),
            candidate.symmetric != ideal.symmetric,
            candidate.scale_dtype != ideal.scale_dtype,
            candidate,
        ),
    )


def _group_length(number_format: Format) -> int:
    return number_format.group if number_format.group > 0 else LONG_GROUP


def float_decision(info: TensorInfo, role: str, capabilities: Capabilities) -> Decision:
    """Return the decision to store floats: in the tensor's dtype if supported, or in float32."""
    dtype = str(info.dtype).removeprefix("torch.")
    reason = FLOAT_ROLES.get(role, "float: as in the checkpoint")
    if dtype in capabilities.floats:
        return Decision(Floats(dtype), "none", reason)
    if not capabilities.floats:
        raise UnsupportedError("the target stores no floating-point tensors", where=info.name)
    fallback = "float32" if "float32" in capabilities.floats else capabilities.floats[0]
    return Decision(Floats(fallback), "none", f"{reason}; the target does not store {dtype}")


def float_nbytes(checkpoint: Checkpoint, decisions: Mapping[str, Decision]) -> int:
    """Return the bytes of the tensors that stay floats."""
    return sum(
        decision.format.nbytes(checkpoint.tensors[name].shape)
        for name, decision in decisions.items()
    )


def unit_choice(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    unit: Unit,
    cost: Callable[[Format], float] = lambda f: 0.0,
) -> Choice:
    """Return the formats of a unit as options with bytes and costs, in the target's order."""
    options = tuple(
        Option(cost(f), unit_nbytes(checkpoint, unit, f), (f.group, f.symmetric, f.scale_dtype))
        for f in capabilities.formats(unit.role)
    )
    bundled = capabilities.expert_layer_shares_group and unit.experts is not None
    return Choice(options, unit.experts if bundled else None)


def unit_nbytes(checkpoint: Checkpoint, unit: Unit, number_format: Format) -> int:
    """Return the bytes of all tensors of a unit in one format."""
    shapes = (checkpoint.tensors[name].shape for name in unit.names)
    return sum(map(number_format.nbytes, shapes))
