"""One width everywhere: methods `uniform` and the plain widths."""

from __future__ import annotations

from collections.abc import Sequence

from lfmc.calib_free.allocate.decision import Decision, nearest, unit_nbytes
from lfmc.calib_free.grid.distortion_curves import grid_for
from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.plan.roles import Unit
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError

DEFAULT_GROUP = 32


def allocate_uniform(
    checkpoint: Checkpoint, capabilities: Capabilities, found: Sequence[Unit], limit: int
) -> dict[str, Decision]:
    """The widest format, then the one of finest groups, that fits `limit` bytes everywhere.

    A role that lacks it takes the nearest it has. Raises `InputError` where none fits.
    """
    formats = formats_by_preference(capabilities, found)
    return _first_that_fits(checkpoint, capabilities, found, formats, limit, "uniform")


def allocate_width(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    bits: int,
    limit: int | None,
) -> dict[str, Decision]:
    """Every matrix at `bits`: in the finest groups that fit `limit` bytes, or in groups of 32.

    Raises `InputError` where the target lacks the width for a role that takes most of the weights
    (an embedding takes the nearest), or where it does not fit.
    """
    for role in dict.fromkeys(unit.role for unit in found):
        widths = sorted({f.bits for f in capabilities.formats(role)})
        if bits not in widths and (role != "embedding" or not widths):
            raise InputError(
                f"the target can't store {role} weights at {bits} bits",
                expected=", ".join(f"{w} bits" for w in widths) or "floats only",
                got=f"{bits} bits",
                todo="choose one of these widths, or auto",
            )
    formats = sorted((f for f in _formats(capabilities, found) if f.bits == bits), key=_preference)
    if limit is None:
        default = Format(bits, DEFAULT_GROUP, False, formats[0].scale_dtype)
        formats = sorted(formats, key=lambda f: (f != default, _preference(f)))
        return _everywhere(capabilities, found, formats[0], f"{bits} bits, as asked")
    return _first_that_fits(checkpoint, capabilities, found, formats, limit, f"{bits} bits")


def formats_by_preference(capabilities: Capabilities, found: Sequence[Unit]) -> list[Format]:
    """What `uniform` tries, in order: the widest first, of one width the finest groups."""
    return sorted(_formats(capabilities, found), key=_preference)


def alike(capabilities: Capabilities, found: Sequence[Unit], wanted: Format) -> list[Format]:
    """The format of each unit where all are to have `wanted`: it, or the nearest its role has."""
    return [nearest(wanted, capabilities.formats(unit.role)) for unit in found]


def _formats(capabilities: Capabilities, found: Sequence[Unit]) -> set[Format]:
    """Formats of every role but the embedding, which follows them by `nearest`."""
    body = [unit.role for unit in found if unit.role != "embedding"] or ["embedding"]
    return {f for role in set(body) for f in capabilities.formats(role)}


def _preference(f: Format) -> tuple[object, ...]:
    return (-f.bits, f.group, f.symmetric, f.scale_dtype)


def _first_that_fits(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    formats: Sequence[Format],
    limit: int,
    what: str,
) -> dict[str, Decision]:
    sizes = []
    for number_format in formats:
        chosen = zip(found, alike(capabilities, found, number_format), strict=True)
        size = sum(unit_nbytes(checkpoint, unit, own) for unit, own in chosen)
        if size <= limit:
            reason = f"{what}: the finest that fits the budget"
            return _everywhere(capabilities, found, number_format, reason)
        sizes.append(size)
    raise InputError(
        f"no format of method '{what}' fits the budget",
        expected=f"at least {min(sizes, default=0)} bytes for the quantized tensors",
        got=f"{limit} bytes",
        todo="raise the budget, or use --bits auto",
    )


def _everywhere(
    capabilities: Capabilities, found: Sequence[Unit], wanted: Format, reason: str
) -> dict[str, Decision]:
    decisions = {}
    for unit, own in zip(found, alike(capabilities, found, wanted), strict=True):
        why = reason if own == wanted else f"{reason}; nearest to {wanted.name} here"
        for name in unit.names:
            decisions[name] = Decision(own, grid_for(own, capabilities), why)
    return decisions
