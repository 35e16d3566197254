"""Read the constants of a bundle from disk and unpack them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import pack_bits
from lfmc.targets.base import StoredTensor
from lfmc.targets.shared.constants import restore_layout
from lfmc.targets.shared.parameters_file import open_parameters
from lfmc.targets.tvm.kernels.layout import unpack_codes, unpack_groups, unpack_zeros


def read(folder: Path, stored: StoredTensor) -> Tensor:
    """Read a constant in the form of `PackedTensor`. The suffix of its name states the part and the
    layout.

    `#codes:BITS:COUNTxROWSxCOLUMNS`, `#zeros:BITS:COUNTxROWSxGROUPS`, `#scales:COUNTxROWSxGROUPS`;
    `#taps` for a filter; float values have none of these suffixes.
    """
    value = open_parameters(folder).tensor(stored.name)
    _, _, suffix = stored.name.partition("#")
    kind, _, layout = suffix.partition(":")
    if not layout:
        return restore_layout(stored.name, value)
    *widths, shape = layout.split(":")
    count, rows, columns = map(int, shape.split("x"))
    pieces = [_unpack(kind, piece, widths, rows, columns) for piece in value.view(count, -1)]
    return pieces[0] if stored.arrangement == "rows" else torch.stack(pieces)


def _unpack(kind: str, value: Tensor, widths: list[str], rows: int, columns: int) -> Tensor:
    if kind == "scales":
        return unpack_groups(value, rows, columns)
    bits = int(widths[0])
    if kind == "codes":
        return pack_bits(unpack_codes(value.view(torch.uint8), bits, rows, columns), bits)
    return pack_bits(unpack_zeros(value, bits, rows, columns), bits)
