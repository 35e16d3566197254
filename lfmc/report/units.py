"""Format numbers with their units."""

from __future__ import annotations

from lfmc.calib_free.grid.formats import ROW, Floats, Format

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def size(nbytes: float) -> str:
    """Format bytes with a binary unit: `4.23 MiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} B"


def percent(share: float) -> str:
    """Format a fraction in percent, with three significant digits: `0.0123 %`."""
    value = 100 * share
    return f"{value:.3g} %" if value >= 1e-4 or value == 0 else f"{value:.2e} %"


def describe_format(stored: Format | Floats) -> str:
    """Describe a format: `4 bits, groups of 32, asymmetric, float16 scales`."""
    if isinstance(stored, Floats):
        return f"{stored.dtype}, not quantized"
    if stored.palette:
        return (
            f"{stored.bits} bits, one table of {1 << stored.bits} {stored.scale_dtype} values "
            "per row"
        )
    kind = "symmetric" if stored.symmetric else "asymmetric"
    groups = "one group per row" if stored.group == ROW else f"groups of {stored.group}"
    return f"{stored.bits} bits, {groups}, {kind}, {stored.scale_dtype} scales"


def short_length(tokens: float) -> str:
    """Format a number of tokens on an axis: `32k` for 32,768."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"
