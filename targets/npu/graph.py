"""The program as one graph of ATen operators, whose inputs are an interface's and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, export

from lfmc.graph.program import Program
from lfmc.targets.npu.forms import Forms, Keep, Style
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.run_program import run_program

Sources = tuple[str, ...]
Shape = Callable[[Sources], tuple[int, ...]]


@dataclass(frozen=True)
class Graph:
    """`exported` takes the interface's inputs, then `constants`, and gives its outputs. `kept` are
    the names of values that it keeps, in order."""

    interface: Interface
    exported: ExportedProgram
    constants: tuple[Sources, ...]
    kept: tuple[str, ...]


class _Plain(nn.Module):
    def __init__(self, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self._run(*values)


def constants_of(
    program: Program, interface: Interface, shape: Shape, style: Style
) -> dict[Sources, Tensor]:
    """What a graph asks for: `shape` is of the constants of some tensors, matrices as `[K, N]`.
    Without values, under a mode of fake tensors."""
    asked: dict[Sources, Tensor] = {}

    def note(sources: Sources) -> Tensor:
        return asked.setdefault(sources, torch.zeros(shape(sources)))

    given = {name: torch.zeros(own) for name, own in interface.inputs.items()}
    run_program(Forms(program, interface, note, lambda value, name: value, style), given)
    return asked


def traced(program: Program, interface: Interface, shape: Shape, keep: Keep, style: Style) -> Graph:
    """Trace without values."""
    with FakeTensorMode(), torch.no_grad():
        given = {name: torch.zeros(own) for name, own in interface.inputs.items()}
        constants = constants_of(program, interface, shape, style)
        kept: list[str] = []

        def noted(value: Tensor, name: str) -> Tensor:
            kept.append(name)
            return keep(value, name)

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            kept.clear()
            inputs = dict(zip(given, values, strict=False))
            held = dict(zip(constants, values[len(given) :], strict=True))
            forms = Forms(program, interface, held.__getitem__, noted, style)
            return tuple(run_program(forms, inputs).values())

        exported = export(_Plain(run), (*given.values(), *constants.values()), strict=False)
    return Graph(interface, exported, tuple(constants), tuple(kept))
