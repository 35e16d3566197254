"""One bit width for all matrices: method `uniform` and the fixed bit widths."""

from __future__ import annotations

from collections.abc import Sequence

from lfmc.calib_free.allocate.decision import Decision, nearest_format, unit_nbytes
from lfmc.calib_free.grid.distortion_curves import grid_for
from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.plan.roles import Unit
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError

DEFAULT_GROUP = 32


def allocate_uniform(
    checkpoint: Checkpoint, capabilities: Capabilities, units: Sequence[Unit], limit: int
) -> dict[str, Decision]:
    """Use one format everywhere: the widest that fits `limit` bytes, with the smallest groups.

    A role without this format uses its nearest one. Raises `InputError` if no format fits.
    """
    formats = formats_by_preference(capabilities, units)
    return _first_that_fits(checkpoint, capabilities, units, formats, limit, "uniform")


def allocate_width(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    units: Sequence[Unit],
    bits: int,
    limit: int | None,
) -> dict[str, Decision]:
    """Store every matrix with `bits` bits, in the smallest groups that fit `limit` bytes.

    Groups have 32 columns if `limit` is None. Raises `InputError` if the target does not support
    the bit width for some role, or if it does not fit. An embedding uses its nearest format
    instead.
    """
    for role in dict.fromkeys(unit.role for unit in units):
        widths = sorted({f.bits for f in capabilities.formats(role)})
        if bits not in widths and (role != "embedding" or not widths):
            raise InputError(
                f"the target can't store {role} weights at {bits} bits",
                expected=", ".join(f"{w} bits" for w in widths) or "floats only",
                got=f"{bits} bits",
                todo="choose one of these widths, or auto",
            )
    formats = sorted(
        (f for f in _body_formats(capabilities, units) if f.bits == bits), key=_preference
    )
    if limit is None:
        default = Format(bits, DEFAULT_GROUP, False, formats[0].scale_dtype)
        formats = sorted(formats, key=lambda f: (f != default, _preference(f)))
        return _decide_all(capabilities, units, formats[0], f"{bits} bits, as asked")
    return _first_that_fits(checkpoint, capabilities, units, formats, limit, f"{bits} bits")


def formats_by_preference(capabilities: Capabilities, units: Sequence[Unit]) -> list[Format]:
    """Return the formats in the order that `uniform` tries them.

    The widest come first, and within one bit width the smallest groups.
    """
    return sorted(_body_formats(capabilities, units), key=_preference)


def nearest_formats(
    capabilities: Capabilities, units: Sequence[Unit], ideal: Format
) -> list[Format]:
    """Return for each unit the format nearest to `ideal` that its role supports."""
    return [nearest_format(ideal, capabilities.formats(unit.role)) for unit in units]


def smallest_uniform_nbytes(
    checkpoint: Checkpoint, capabilities: Capabilities, units: Sequence[Unit]
) -> int:
    """Return the bytes of the units in the smallest of the formats that `uniform` tries."""
    formats = formats_by_preference(capabilities, units)
    return min(_size(checkpoint, capabilities, units, candidate) for candidate in formats)


def _size(
    checkpoint: Checkpoint, capabilities: Capabilities, units: Sequence[Unit], ideal: Format
) -> int:
    """Return the bytes of the units, each in its format nearest to `ideal`."""
    pairs = zip(units, nearest_formats(capabilities, units, ideal), strict=True)
    return sum(unit_nbytes(checkpoint, unit, unit_format) for unit, unit_format in pairs)


def _body_formats(capabilities: Capabilities, units: Sequence[Unit]) -> set[Format]:
    """Return the formats of every role except the embedding.

    The embedding uses the nearest one of its formats.
    """
    roles = [unit.role for unit in units if unit.role != "embedding"] or ["embedding"]
    return {number_format for role in set(roles) for number_format in capabilities.formats(role)}


def _preference(number_format: Format) -> tuple[object, ...]:
    return (
        -number_format.bits,
        number_format.group,
        number_format.symmetric,
        number_format.scale_dtype,
    )


def _first_that_fits(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    units: Sequence[Unit],
    formats: Sequence[Format],
    limit: int,
    method: str,
) -> dict[str, Decision]:
    sizes = []
    for number_format in formats:
        size = _size(checkpoint, capabilities, units, number_format)
        if size <= limit:
            reason = f"{method}: the finest that fits the budget"
            return _decide_all(capabilities, units, number_format, reason)
        sizes.append(size)
    raise InputError(
        f"no format of method '{method}' fits the budget",
        expected=f"at least {min(sizes, default=0)} bytes for the quantized tensors",
        got=f"{limit} bytes",
        todo="raise the budget, or use --bits auto",
    )


def _decide_all(
    capabilities: Capabilities, units: Sequence[Unit], ideal: Format, reason: str
) -> dict[str, Decision]:
    decisions = {}
    for unit, number_format in zip(units, nearest_formats(capabilities, units, ideal), strict=True):
        unit_reason = (
            reason if number_format == ideal else f"{reason}; nearest to {ideal.name} here"
        )
        for name in unit.names:
            decisions[name] = Decision(
                number_format, grid_for(number_format, capabilities), unit_reason
            )
    return decisions
