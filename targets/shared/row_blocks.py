"""Blocks of 16 rows: the n-bit matrix layout of the targets for which lfmc writes the kernels."""

from __future__ import annotations

from collections.abc import Mapping

from lfmc.calib_free.grid.formats import Format
from lfmc.errors import UnsupportedError

ROWS = 16

# The bit planes that make up each bit width, lowest bits first.
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}

FORMATS = tuple(
    Format(bits, group, symmetric, "float16")
    for bits in PLANES
    for group in (32, 64, 128)
    for symmetric in (True, False)
)


def require_whole_blocks(sizes: Mapping[str, int], rows: int = ROWS) -> None:
    """Raise `UnsupportedError` for the first size of a model that is not a multiple of `rows`."""
    for name, size in sizes.items():
        if size % rows:
            raise UnsupportedError(
                f"the {name} is no multiple of {rows}, the rows of a block", got=size
            )
