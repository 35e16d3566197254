"""Names and packing of the program's n-bit matrices as parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.targets.base import Arrangement
from lfmc.targets.shared.constants import Constants, Sources, stack_name
from lfmc.targets.shared.parameters_file import Parameter
from lfmc.targets.shared.row_blocks import ROWS
from lfmc.targets.tvm.kernels.layout import pack_codes, pack_groups, pack_zeros
from lfmc.targets.tvm.kernels.matrix import Matrix
from lfmc.targets.tvm.kernels.moe import FloatStack, Stack


class TvmConstants(Constants):
    """Constants whose n-bit matrices are packed in blocks of rows
    (`lfmc.targets.tvm.kernels.layout`)."""

    def matrix(self, sources: Sources) -> tuple[Matrix, list[Parameter]]:
        """Return an n-bit matrix and its parameters; the rows of the sources lie one below the
        other."""
        shapes = [self.weights.checkpoint.tensors[name].shape for name in sources]
        rows = sum(shape[0] for shape in shapes)
        format, columns = self.format(sources[0]), shapes[0][1]
        matrix = Matrix(format, rows, columns, format.groups_per_row(columns), rows % ROWS)
        packed = lambda: [self.weights.packed(sources)]  # noqa: E731
        return matrix, self._parameters(matrix, sources, "rows", packed)

    def stack(self, names: Sources) -> tuple[Stack, list[Parameter]]:
        """Return the matrices of experts of one shape and format, and their parameters."""
        format, (rows, columns) = self.weights.format(names[0]), self.shape(names[0])
        if isinstance(format, Format):
            matrix = Matrix(format, rows, columns, format.groups_per_row(columns), 0, len(names))
            return format, self._parameters(matrix, names, "experts", self._pack_each(names))
        return FloatStack(rows, columns, format.dtype), [self.float_stack(names)]

    def _pack_each(self, names: Sources) -> Callable[[], list[PackedTensor]]:
        return lambda: [self.weights.packed((name,)) for name in names]

    def _parameters(
        self,
        matrix: Matrix,
        sources: Sources,
        order: Arrangement,
        packed: Callable[[], list[PackedTensor]],
    ) -> list[Parameter]:
        bits = matrix.format.bits
        name = stack_name(sources) if order != "rows" else "+".join(sources)
        count, rows, groups = matrix.count, matrix.rows, matrix.groups
        parts: list[tuple[str, str, Callable[[PackedTensor], Tensor]]] = [
            (
                "codes",
                f"{bits}:{count}x{rows}x{matrix.columns}",
                lambda p: pack_codes(p.codes, bits).view(torch.uint32),
            ),
            ("scales", f"{count}x{rows}x{groups}", lambda p: pack_groups(p.scales)),
        ]
        if not matrix.format.symmetric:
            parts.append(("zeros", f"{bits}:{count}x{rows}x{groups}", lambda p: _zeros(p, bits)))

        def pack_all(pack: Callable[[PackedTensor], Tensor]) -> Callable[[], Tensor]:
            return lambda: torch.cat([pack(tensor) for tensor in packed()])

        return [
            self.add(
                f"{name}#{part}:{form}", dtype, tuple(shape), part, sources, order, pack_all(pack)
            )
            for (part, form, pack), (_, shape, dtype) in zip(
                parts, matrix.parameters(""), strict=True
            )
        ]


def _zeros(packed: PackedTensor, bits: int) -> Tensor:
    assert packed.zeros is not None
    return pack_zeros(packed.zeros, bits)
