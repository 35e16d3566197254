"""Export the program as one graph of ATen operators over an interface's inputs and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, export

from lfmc.graph.program import Program
from lfmc.targets.npu.forms import Forms, RoundValue, Style
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.run_program import run_program

Sources = tuple[str, ...]
ShapeOf = Callable[[Sources], tuple[int, ...]]


@dataclass(frozen=True)
class Graph:
    """An exported graph.

    The inputs of `exported` are those of the interface, then `constants`. Its outputs are those of
    the interface. `value_names` are the names of the rounded values, in order.
    """

    interface: Interface
    exported: ExportedProgram
    constants: tuple[Sources, ...]
    value_names: tuple[str, ...]


class _ProgramModule(nn.Module):
    def __init__(self, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self._run(*values)


def collect_constants(
    program: Program, interface: Interface, shape_of: ShapeOf, style: Style
) -> dict[Sources, Tensor]:
    """Return a fake tensor for each constant of the graph, in the order of first use.

    `shape_of` returns the shape of a constant by its checkpoint tensors; matrices are `[K, N]`.
    Call this function under a fake tensor mode.
    """
    constants: dict[Sources, Tensor] = {}

    def read_constant(sources: Sources) -> Tensor:
        return constants.setdefault(sources, torch.zeros(shape_of(sources)))

    inputs = {name: torch.zeros(shape) for name, shape in interface.inputs.items()}
    run_program(Forms(program, interface, read_constant, lambda value, name: value, style), inputs)
    return constants


def trace_graph(
    program: Program, interface: Interface, shape_of: ShapeOf, round_value: RoundValue, style: Style
) -> Graph:
    """Trace the program with fake tensors."""
    with FakeTensorMode(), torch.no_grad():
        example = {name: torch.zeros(shape) for name, shape in interface.inputs.items()}
        constants = collect_constants(program, interface, shape_of, style)
        value_names: list[str] = []

        def round_and_record(value: Tensor, name: str) -> Tensor:
            value_names.append(name)
            return round_value(value, name)

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            value_names.clear()
            inputs = dict(zip(example, values, strict=False))
            constant_values = dict(zip(constants, values[len(example) :], strict=True))
            read_constant = constant_values.__getitem__
            forms = Forms(program, interface, read_constant, round_and_record, style)
            return tuple(run_program(forms, inputs).values())

        arguments = (*example.values(), *constants.values())
        exported = export(_ProgramModule(run), arguments, strict=False)
    return Graph(interface, exported, tuple(constants), tuple(value_names))
