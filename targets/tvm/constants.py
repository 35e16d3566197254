"""The program's n-bit matrices as parameters: what they are called, and how they are packed."""

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
from lfmc.targets.tvm.kernels.moe import Floats, Stack


class TvmConstants(Constants):
    """Matrices in blocks of rows (`lfmc.targets.tvm.kernels.layout`)."""

    def matrix(self, sources: Sources) -> tuple[Matrix, list[Parameter]]:
        """An n-bit matrix, its sources' rows one below the other."""
        shapes = [self.weights.checkpoint.tensors[name].shape for name in sources]
        rows = sum(shape[0] for shape in shapes)
        format, columns = self.format(sources[0]), shapes[0][1]
        matrix = Matrix(format, rows, columns, format.groups(columns), rows % ROWS)
        packed = lambda: [self.weights.packed(sources)]  # noqa: E731
        return matrix, self._parts(matrix, sources, "rows", packed)

    def stack(self, names: Sources) -> tuple[Stack, list[Parameter]]:
        """Experts' matrices of one shape and format."""
        kind, (rows, columns) = self.weights.format(names[0]), self.shape(names[0])
        if isinstance(kind, Format):
            matrix = Matrix(kind, rows, columns, kind.groups(columns), 0, len(names))
            return kind, self._parts(matrix, names, "experts", self._each(names))
        return Floats(rows, columns, kind.dtype), [self.float_stack(names)]

    def _each(self, names: Sources) -> Callable[[], list[PackedTensor]]:
        return lambda: [self.weights.packed((name,)) for name in names]

    def _parts(
        self,
        matrix: Matrix,
        sources: Sources,
        order: Arrangement,
        packed: Callable[[], list[PackedTensor]],
    ) -> list[Parameter]:
        bits, name = (
            matrix.format.bits,
            stack_name(sources) if order != "rows" else "+".join(sources),
        )
        count, rows, groups = matrix.count, matrix.rows, matrix.groups
        kinds: list[tuple[str, str, Callable[[PackedTensor], Tensor]]] = [
            (
                "codes",
                f"{bits}:{count}x{rows}x{matrix.columns}",
                lambda p: pack_codes(p.codes, bits).view(torch.uint32),
            ),
            ("scales", f"{count}x{rows}x{groups}", lambda p: pack_groups(p.scales)),
        ]
        if not matrix.format.symmetric:
            kinds.append(("zeros", f"{bits}:{count}x{rows}x{groups}", lambda p: _zeros(p, bits)))

        def make(pack: Callable[[PackedTensor], Tensor]) -> Callable[[], Tensor]:
            return lambda: torch.cat([pack(one) for one in packed()])

        return [
            self.add(f"{name}#{part}:{form}", dtype, tuple(shape), part, sources, order, make(pack))
            for (part, form, pack), (_, shape, dtype) in zip(
                kinds, matrix.parameters(""), strict=True
            )
        ]


def _zeros(packed: PackedTensor, bits: int) -> Tensor:
    assert packed.zeros is not None
    return pack_zeros(packed.zeros, bits)
