"""Numbers as people read them, each with its unit."""

from __future__ import annotations

from lfmc.calib_free.grid.formats import ROW, Floats, Format

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them: `4.23 MiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} B"


def percent(share: float) -> str:
    """A share in percent, of three significant digits: `0.0123 %`."""
    value = 100 * share
    return f"{value:.3g} %" if value >= 1e-4 or value == 0 else f"{value:.2e} %"


def stored_as(stored: Format | Floats) -> str:
    """A format in words: `4 bits, groups of 32, asymmetric, float16 scales`."""
    if isinstance(stored, Floats):
        return f"{stored.dtype}, not quantized"
    if stored.palette:
        return (
            f"{stored.bits} bits, a table of {1 << stored.bits} {stored.scale_dtype} values a row"
        )
    kind = "symmetric" if stored.symmetric else "asymmetric"
    groups = "whole rows" if stored.group == ROW else f"groups of {stored.group}"
    return f"{stored.bits} bits, {groups}, {kind}, {stored.scale_dtype} scales"


def short_length(tokens: float) -> str:
    """Tokens on an axis: `32k` for 32,768."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"
