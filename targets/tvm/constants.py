"""The program's constants as parameters: what they are called, and how they are packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lfmc.calib_free.formats import Floats as FloatFormat
from lfmc.calib_free.formats import Format
from lfmc.calib_free.pack import PackedTensor
from lfmc.targets.base import Arrangement, StoredTensor
from lfmc.targets.tvm.kernels.matrix import Matrix
from lfmc.targets.tvm.kernels.moe import Floats, Stack
from lfmc.targets.tvm.layout import ROWS, pack_codes, pack_groups, pack_zeros
from lfmc.targets.tvm.parameters import DTYPES, Parameter
from lfmc.weights import PlannedWeights

Sources = tuple[str, ...]


class Constants:
    """Parameters by name, in the order in which they are first asked for."""

    def __init__(self, weights: PlannedWeights) -> None:
        self.weights = weights
        self.parameters: dict[str, Parameter] = {}
        self.stored: list[StoredTensor] = []

    def floats(self, sources: Sources, *, taps: bool = False) -> Parameter:
        """Values that stay float, as stored, a filter as `[taps, H]`."""
        shapes = [self.weights.checkpoint.tensors[name].shape for name in sources]
        shape = (sum(own[0] for own in shapes), *shapes[0][1:])
        name = "+".join(sources)
        if taps:
            name, shape = name + "#taps", (shape[2], shape[0])

        def make() -> Tensor:
            value = self.weights.floats(sources)
            return value[:, 0].T.contiguous() if taps else value

        return self._add(name, self._dtype(sources[0]), shape, "values", sources, "rows", make)

    def of_config(self, name: str, make: Callable[[], Tensor]) -> Parameter:
        """What follows from the configuration, float32: no tensor of the plan."""
        if name not in self.parameters:
            self.parameters[name] = Parameter(name, "float32", tuple(make().shape), make)
        return self.parameters[name]

    def matrix(self, sources: Sources) -> tuple[Matrix, list[Parameter]]:
        """An n-bit matrix, its sources' rows one below the other."""
        shapes = [self.weights.checkpoint.tensors[name].shape for name in sources]
        rows = sum(shape[0] for shape in shapes)
        format, columns = self._format(sources[0]), shapes[0][1]
        matrix = Matrix(format, rows, columns, format.groups(columns), rows % ROWS)
        packed = lambda: [self.weights.packed(sources)]  # noqa: E731
        return matrix, self._parts(matrix, sources, "rows", packed)

    def stack(self, names: Sources) -> tuple[Stack, list[Parameter]]:
        """Experts' matrices of one shape and format."""
        kind, (rows, columns) = self.weights.format(names[0]), self.shape(names[0])
        if isinstance(kind, Format):
            matrix = Matrix(kind, rows, columns, kind.groups(columns), 0, len(names))
            return kind, self._parts(matrix, names, "experts", self._each(names))
        floats, shape = Floats(rows, columns, kind.dtype), (len(names), rows, columns)
        name, make = _stack_name(names), self._stacked(names)
        own = self._add(name, kind.dtype, shape, "values", names, "experts", make)
        return floats, [own]

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.weights.checkpoint.tensors[name].shape
        return rows, columns

    def _each(self, names: Sources) -> Callable[[], list[PackedTensor]]:
        return lambda: [self.weights.packed((name,)) for name in names]

    def _stacked(self, names: Sources) -> Callable[[], Tensor]:
        return lambda: torch.stack([self.weights.floats((name,)) for name in names])

    def _parts(
        self,
        matrix: Matrix,
        sources: Sources,
        order: Arrangement,
        packed: Callable[[], list[PackedTensor]],
    ) -> list[Parameter]:
        bits, name = (
            matrix.format.bits,
            _stack_name(sources) if order != "rows" else "+".join(sources),
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
            self._add(
                f"{name}#{part}:{form}", dtype, tuple(shape), part, sources, order, make(pack)
            )
            for (part, form, pack), (_, shape, dtype) in zip(
                kinds, matrix.parameters(""), strict=True
            )
        ]

    def _add(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        part: str,
        sources: Sources,
        order: Arrangement,
        make: Callable[[], Tensor],
    ) -> Parameter:
        if name not in self.parameters:
            own = Parameter(name, dtype, tuple(shape), make)
            self.parameters[name] = own
            self.stored.append(StoredTensor(name, part, sources, order, own.nbytes))
        return self.parameters[name]

    def _format(self, name: str) -> Format:
        found = self.weights.format(name)
        assert isinstance(found, Format)
        return found

    def _dtype(self, name: str) -> str:
        found: Any = self.weights.format(name)
        assert isinstance(found, FloatFormat)
        assert found.dtype in DTYPES
        return found.dtype


def _zeros(packed: PackedTensor, bits: int) -> Tensor:
    assert packed.zeros is not None
    return pack_zeros(packed.zeros, bits)


def _stack_name(sources: Sources) -> str:
    """`...experts.0,2,5.w1.weight` of experts 0, 2 and 5."""
    before, _, rest = sources[0].partition(".experts.")
    _, _, leaf = rest.partition(".")
    indices = ",".join(name.partition(".experts.")[2].split(".")[0] for name in sources)
    return f"{before}.experts.{indices}.{leaf}"
