"""The program's n-bit matrices as parameters, and their readback from a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor, pack_bits
from lfmc.targets.base import Arrangement, StoredTensor
from lfmc.targets.mlir.layout import (
    pack_codes,
    pack_groups,
    pack_zeros,
    unpack_codes,
    unpack_groups,
    unpack_zeros,
)
from lfmc.targets.shared.constants import Constants, Sources, restore_layout, stack_name
from lfmc.targets.shared.parameters_file import Parameter, open_parameters
from lfmc.targets.shared.row_blocks import ROWS


@dataclass(frozen=True)
class Matrix:
    """An n-bit matrix, or `count` matrices stacked along the first dim of the parameters."""

    format: Format
    rows: int
    columns: int
    count: int | None
    codes: Parameter
    scales: Parameter
    zeros: Parameter | None


class MlirConstants(Constants):
    """Matrices in blocks of rows (`lfmc.targets.mlir.layout`)."""

    def matrix(self, sources: Sources) -> Matrix:
        """Add a matrix whose rows are those of its sources, concatenated."""
        shapes = [self.shape(name) for name in sources]
        rows = sum(shape[0] for shape in shapes)
        load_packed = lambda: [self.weights.packed(sources)]  # noqa: E731
        return self._add_matrix("+".join(sources), sources, "rows", rows, shapes[0][1], load_packed)

    def stack(self, names: Sources) -> Matrix:
        """Add a stack of experts' matrices of one shape and format."""
        load_packed = lambda: [self.weights.packed((name,)) for name in names]  # noqa: E731
        return self._add_matrix(
            stack_name(names), names, "experts", *self.shape(names[0]), load_packed
        )

    def _add_matrix(
        self,
        name: str,
        sources: Sources,
        order: Arrangement,
        rows: int,
        columns: int,
        load_packed: Callable[[], list[PackedTensor]],
    ) -> Matrix:
        format = self.format(sources[0])
        bits, groups, blocks = format.bits, columns // format.group, rows // ROWS
        count = None if order == "rows" else len(sources)

        def add_part(
            kind: str, dtype: str, shape: tuple[int, ...], pack: Callable[[PackedTensor], Tensor]
        ) -> Parameter:
            def make() -> Tensor:
                pieces = [pack(packed) for packed in load_packed()]
                return pieces[0] if count is None else torch.stack(pieces)

            full_shape = shape if count is None else (count, *shape)
            suffix = f"{kind}:{bits}:{format.group}"
            return self.add(f"{name}#{suffix}", dtype, full_shape, kind, sources, order, make)

        def pack_zero_points(packed: PackedTensor) -> Tensor:
            assert packed.zeros is not None
            return pack_zeros(packed.zeros, bits)

        codes = add_part(
            "codes",
            "uint8",
            (blocks, groups, bits, format.group // 8, ROWS),
            lambda packed: pack_codes(packed.codes, bits, format.group),
        )
        scales = add_part(
            "scales", "float16", (blocks, groups, ROWS), lambda packed: pack_groups(packed.scales)
        )
        zeros = None
        if not format.symmetric:
            zeros = add_part("zeros", "uint8", (blocks, groups, bits, 1, 2), pack_zero_points)
        return Matrix(format, rows, columns, count, codes, scales, zeros)


def read(folder: Path, stored: StoredTensor) -> Tensor:
    """Read a constant in the layout of `PackedTensor`; its name ends in `#codes:BITS:GROUP`."""
    value = open_parameters(folder).tensor(stored.name)
    _, _, suffix = stored.name.partition("#")
    kind, _, numbers = suffix.partition(":")
    if not numbers:
        return restore_layout(stored.name, value)
    bits = int(numbers.split(":")[0])
    if stored.arrangement == "rows":
        return _unpack_part(kind, value, bits)
    return torch.stack([_unpack_part(kind, matrix, bits) for matrix in value])


def _unpack_part(kind: str, value: Tensor, bits: int) -> Tensor:
    if kind == "scales":
        return unpack_groups(value).clone()
    return pack_bits((unpack_codes if kind == "codes" else unpack_zeros)(value, bits), bits)
