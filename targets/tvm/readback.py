"""Constants of a bundle as they lie on disk, unpacked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import pack_bits
from lfmc.targets.base import StoredTensor
from lfmc.targets.shared.constants import plain_values
from lfmc.targets.shared.parameters_file import open_parameters
from lfmc.targets.tvm.kernels.layout import unpack_codes, unpack_groups, unpack_zeros


def read(folder: Path, stored: StoredTensor) -> Tensor:
    """A constant as `PackedTensor` has it: its name ends in what it is, and how it lies.

    `#codes:BITS:COUNTxROWSxCOLUMNS`, `#zeros:BITS:COUNTxROWSxGROUPS`, `#scales:COUNTxROWSxGROUPS`;
    `#taps` of a filter; plain values have no such end.
    """
    value = open_parameters(folder).tensor(stored.name)
    _, _, form = stored.name.partition("#")
    kind, _, rest = form.partition(":")
    if not rest:
        return plain_values(stored.name, value)
    *bits, shape = rest.split(":")
    count, rows, columns = map(int, shape.split("x"))
    pieces = [_unpack(kind, piece, bits, rows, columns) for piece in value.view(count, -1)]
    return pieces[0] if stored.arrangement == "rows" else torch.stack(pieces)


def _unpack(kind: str, value: Tensor, bits: list[str], rows: int, columns: int) -> Tensor:
    if kind == "scales":
        return unpack_groups(value, rows, columns)
    width = int(bits[0])
    if kind == "codes":
        return pack_bits(unpack_codes(value.view(torch.uint8), width, rows, columns), width)
    return pack_bits(unpack_zeros(value, width, rows, columns), width)
