"""The constants of a program as named parameters of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.targets.base import Arrangement, StoredTensor
from lfmc.targets.shared.parameters_file import DTYPES, Parameter

Sources = tuple[str, ...]


class Constants:
    """Parameters by name, in the order of their first use.

    A target's subclass adds the packing of n-bit matrices.
    """

    def __init__(self, weights: PlannedWeights) -> None:
        self.weights = weights
        self.parameters: dict[str, Parameter] = {}
        self.stored: list[StoredTensor] = []

    def floats(self, sources: Sources, *, taps: bool = False) -> Parameter:
        """Return a float tensor in its stored dtype; `taps` stores a filter as `[taps, H]`."""
        shapes = [self.weights.checkpoint.tensors[name].shape for name in sources]
        shape = (sum(source[0] for source in shapes), *shapes[0][1:])
        name = "+".join(sources)
        if taps:
            name, shape = name + TAPS, (shape[2], shape[0])

        def make() -> Tensor:
            value = self.weights.floats(sources)
            return value[:, 0].T.contiguous() if taps else value

        kind = self.weights.format(sources[0])
        assert isinstance(kind, Floats)
        return self.add(name, kind.dtype, shape, "values", sources, "rows", make)

    def config_constant(self, name: str, make: Callable[[], Tensor]) -> Parameter:
        """Return a float32 constant that is computed from the model configuration."""
        if name not in self.parameters:
            self.parameters[name] = Parameter(name, "float32", tuple(make().shape), make)
        return self.parameters[name]

    def float_stack(self, names: Sources) -> Parameter:
        """Return float matrices of experts, all of one shape, stacked as `[E, rows, columns]`."""
        kind = self.weights.format(names[0])
        assert isinstance(kind, Floats)
        shape = (len(names), *self.shape(names[0]))
        make = lambda: torch.stack([self.weights.floats((name,)) for name in names])  # noqa: E731
        return self.add(stack_name(names), kind.dtype, shape, "values", names, "experts", make)

    def group_experts_by_format(
        self, experts: Sequence[tuple[str, ...]]
    ) -> list[tuple[list[int], list[tuple[str, ...]]]]:
        """Group experts whose matrices have the same formats.

        `experts` lists the matrix names of each expert. Returns, for each group, the position of
        every expert within the group (-1 if it is not a member), and the members' matrix names.
        """
        formats = [tuple(map(self.weights.format, names)) for names in experts]
        groups = []
        for key in dict.fromkeys(formats):
            members = [
                index for index, expert_formats in enumerate(formats) if expert_formats == key
            ]
            positions = [members.index(i) if i in members else -1 for i in range(len(experts))]
            groups.append((positions, [experts[i] for i in members]))
        return groups

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.weights.checkpoint.tensors[name].shape
        return rows, columns

    def format(self, name: str) -> Format:
        """Return the format of a quantized tensor."""
        tensor_format = self.weights.format(name)
        assert isinstance(tensor_format, Format)
        return tensor_format

    def add(
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
            assert dtype in DTYPES
            parameter = Parameter(name, dtype, shape, make)
            self.parameters[name] = parameter
            self.stored.append(StoredTensor(name, part, sources, order, parameter.nbytes))
        return self.parameters[name]


TAPS = "#taps"  # suffix of the name of a filter, which is stored as `[taps, H]`


def restore_layout(name: str, value: Tensor) -> Tensor:
    """Return a float parameter in the layout of the checkpoint."""
    return value.T.unsqueeze(1).contiguous() if name.endswith(TAPS) else value.clone()


def stack_name(sources: Sources) -> str:
    """Return `...experts.0,2,5.w1.weight` for the w1 matrices of experts 0, 2 and 5."""
    prefix, _, rest = sources[0].partition(".experts.")
    _, _, leaf = rest.partition(".")
    indices = ",".join(name.partition(".experts.")[2].split(".")[0] for name in sources)
    return f"{prefix}.experts.{indices}.{leaf}"
