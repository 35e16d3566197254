"""A program's constants as parameters of an artifact: what they are called, and what they hold."""

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
    """Parameters by name, in the order in which they are first asked for; a target adds how n-bit
    matrices are packed."""

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
            name, shape = name + TAPS, (shape[2], shape[0])

        def make() -> Tensor:
            value = self.weights.floats(sources)
            return value[:, 0].T.contiguous() if taps else value

        kind = self.weights.format(sources[0])
        assert isinstance(kind, Floats)
        return self.add(name, kind.dtype, shape, "values", sources, "rows", make)

    def of_config(self, name: str, make: Callable[[], Tensor]) -> Parameter:
        """What follows from the configuration, float32: no tensor of the plan."""
        if name not in self.parameters:
            self.parameters[name] = Parameter(name, "float32", tuple(make().shape), make)
        return self.parameters[name]

    def float_stack(self, names: Sources) -> Parameter:
        """Experts' matrices of one shape that stay float, `[E, rows, columns]`."""
        kind = self.weights.format(names[0])
        assert isinstance(kind, Floats)
        shape = (len(names), *self.shape(names[0]))
        make = lambda: torch.stack([self.weights.floats((name,)) for name in names])  # noqa: E731
        return self.add(stack_name(names), kind.dtype, shape, "values", names, "experts", make)

    def expert_kinds(
        self, experts: Sequence[tuple[str, ...]]
    ) -> list[tuple[list[int], list[tuple[str, ...]]]]:
        """Experts, each by the names of its matrices, of which those of the same formats go
        together: where each of all experts is among them, or -1, and their names."""
        formats = [tuple(map(self.weights.format, names)) for names in experts]
        kinds = []
        for kind in dict.fromkeys(formats):
            own = [index for index, other in enumerate(formats) if other == kind]
            members = [own.index(index) if index in own else -1 for index in range(len(experts))]
            kinds.append((members, [experts[index] for index in own]))
        return kinds

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.weights.checkpoint.tensors[name].shape
        return rows, columns

    def format(self, name: str) -> Format:
        """Of a tensor that is quantized."""
        found = self.weights.format(name)
        assert isinstance(found, Format)
        return found

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
            own = Parameter(name, dtype, shape, make)
            self.parameters[name] = own
            self.stored.append(StoredTensor(name, part, sources, order, own.nbytes))
        return self.parameters[name]


TAPS = "#taps"  # ends the name of a filter, which lies `[taps, H]`


def plain_values(name: str, value: Tensor) -> Tensor:
    """A parameter that stays float, as the checkpoint has it."""
    return value.T.unsqueeze(1).contiguous() if name.endswith(TAPS) else value.clone()


def stack_name(sources: Sources) -> str:
    """`...experts.0,2,5.w1.weight` of experts 0, 2 and 5."""
    before, _, rest = sources[0].partition(".experts.")
    _, _, leaf = rest.partition(".")
    indices = ",".join(name.partition(".experts.")[2].split(".")[0] for name in sources)
    return f"{before}.experts.{indices}.{leaf}"
