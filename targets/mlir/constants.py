"""The program's n-bit matrices as parameters, and how they are read back from a bundle."""

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
from lfmc.targets.shared.constants import Constants, Sources, plain_values, stack_name
from lfmc.targets.shared.parameters_file import Parameter, open_parameters
from lfmc.targets.shared.row_blocks import ROWS


@dataclass(frozen=True)
class Matrix:
    """An n-bit matrix, or `count` of them behind each other on the parameters' first dim."""

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
        """A matrix, its sources' rows one below the other."""
        shapes = [self.shape(name) for name in sources]
        rows = sum(shape[0] for shape in shapes)
        packed = lambda: [self.weights.packed(sources)]  # noqa: E731
        return self._parts("+".join(sources), sources, "rows", rows, shapes[0][1], packed)

    def stack(self, names: Sources) -> Matrix:
        """Experts' matrices of one shape and format."""
        packed = lambda: [self.weights.packed((name,)) for name in names]  # noqa: E731
        return self._parts(stack_name(names), names, "experts", *self.shape(names[0]), packed)

    def _parts(
        self,
        name: str,
        sources: Sources,
        order: Arrangement,
        rows: int,
        columns: int,
        packed: Callable[[], list[PackedTensor]],
    ) -> Matrix:
        format = self.format(sources[0])
        bits, groups, blocks = format.bits, columns // format.group, rows // ROWS
        count = None if order == "rows" else len(sources)

        def part(
            kind: str, dtype: str, shape: tuple[int, ...], pack: Callable[[PackedTensor], Tensor]
        ) -> Parameter:
            def make() -> Tensor:
                pieces = [pack(one) for one in packed()]
                return pieces[0] if count is None else torch.stack(pieces)

            whole = shape if count is None else (count, *shape)
            end = f"{kind}:{bits}:{format.group}"
            return self.add(f"{name}#{end}", dtype, whole, kind, sources, order, make)

        def zero_points(one: PackedTensor) -> Tensor:
            assert one.zeros is not None
            return pack_zeros(one.zeros, bits)

        codes = part(
            "codes",
            "uint8",
            (blocks, groups, bits, format.group // 8, ROWS),
            lambda one: pack_codes(one.codes, bits, format.group),
        )
        scales = part(
            "scales", "float16", (blocks, groups, ROWS), lambda one: pack_groups(one.scales)
        )
        zeros = None
        if not format.symmetric:
            zeros = part("zeros", "uint8", (blocks, groups, bits, 1, 2), zero_points)
        return Matrix(format, rows, columns, count, codes, scales, zeros)


def read(folder: Path, stored: StoredTensor) -> Tensor:
    """A constant as `PackedTensor` has it: its name ends in what it is, `#codes:BITS:GROUP`."""
    value = open_parameters(folder).tensor(stored.name)
    _, _, form = stored.name.partition("#")
    kind, _, rest = form.partition(":")
    if not rest:
        return plain_values(stored.name, value)
    bits = int(rest.split(":")[0])
    if stored.arrangement == "rows":
        return _unpacked(kind, value, bits)
    return torch.stack([_unpacked(kind, one, bits) for one in value])


def _unpacked(kind: str, value: Tensor, bits: int) -> Tensor:
    if kind == "scales":
        return unpack_groups(value).clone()
    return pack_bits((unpack_codes if kind == "codes" else unpack_zeros)(value, bits), bits)
