"""The module's functions as graphs of ATen operators, whose inputs are states and parameters.

decode    tokens int32 [1], start int32 [1], states, parameters -> logits [1, V], states
score_N   the same inputs with N tokens -> logits [N, V], states
prefill_N the same inputs with N tokens -> logits [1, V] of the last token, states
prepare   packed zero points -> one per byte; the other functions take the unpacked ones
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lfmc.graph.program import Program
from lfmc.model import StateSpec
from lfmc.targets.mlir.arithmetic import Arithmetic, replace_puts_by_slices
from lfmc.targets.mlir.constants import MlirConstants
from lfmc.targets.mlir.forms import Forms
from lfmc.targets.mlir.named import NamedOperators
from lfmc.targets.mlir.run_program import run_program
from lfmc.targets.shared.parameters_file import DTYPES, Parameter
from lfmc.targets.shared.row_blocks import ROWS

DECODE, PREPARE = "decode", "prepare"
SHORT_CALL = 8  # tokens of a call, if fewer than a chunk remain


@dataclass(frozen=True)
class FunctionSpec:
    """A function that takes tokens."""

    name: str
    tokens: int
    last_only: bool = False


def function_specs(chunk: int) -> list[FunctionSpec]:
    """Return the functions for one token and for calls of two lengths."""
    specs = [FunctionSpec(DECODE, 1)]
    for count in sorted({min(SHORT_CALL, chunk), chunk}):
        specs.append(FunctionSpec(f"score_{count}", count))
        specs.append(FunctionSpec(f"prefill_{count}", count, last_only=True))
    return specs


def state_shape(spec: StateSpec) -> tuple[int, ...]:
    """Return a state's shape: a filter `[taps - 1, H]`, keys `[K, D, C]`, values `[K, C, D]`."""
    if spec.kind == "conv":
        _, channels, back = spec.shape
        return back, channels
    _, heads, slots, dim = spec.shape
    return (heads, dim, slots) if spec.kind == "key" else (heads, slots, dim)


class Graphs:
    """All functions of a program.

    The functions take `parameters` after the states, in this order. `packed` are the parameters
    that `prepare` unpacks; `arguments` are the dtypes and shapes that the functions take.
    """

    def __init__(
        self,
        program: Program,
        constants: MlirConstants,
        chunk: int,
        arithmetic: Arithmetic,
        decompositions: Mapping[Any, Callable[..., Any]],
        named: NamedOperators | None,
    ) -> None:
        self.program, self.constants, self.arithmetic = program, constants, arithmetic
        self.named = named
        self.functions, self._decompositions = function_specs(chunk), decompositions
        for function in self.functions[:2]:  # the parameters for one token and for several
            self._collect_parameters(function)
        self.parameters = list(constants.parameters.values())
        self.packed = [parameter for parameter in self.parameters if _zero_point_bits(parameter)]
        self.arguments = [self._as_argument(parameter) for parameter in self.parameters]

    def graph(self, function: FunctionSpec) -> fx.GraphModule:
        """Trace a function."""
        names, count = [parameter.name for parameter in self.parameters], len(self.program.states)

        def run(tokens: Tensor, start: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(names, rest[count:], strict=True))
            load = lambda parameter: values[parameter.name]  # noqa: E731
            forms = Forms(self.program, self.constants, load, self.arithmetic)
            states, last_only = rest[:count], function.last_only
            return run_program(forms, tokens, start, states, last_only=last_only, named=self.named)

        with FakeTensorMode():
            arguments = [*self._inputs(function), *map(_empty, self.arguments)]
        return self._trace(run, arguments)

    def prepare(self) -> fx.GraphModule:
        """Trace the function that unpacks zero points."""

        def run(*packed: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                self.arithmetic.prepare_zeros(value, _zero_point_bits(parameter), parameter.shape)
                for value, parameter in zip(packed, self.packed, strict=True)
            )

        with FakeTensorMode():
            arguments = [
                _empty(self.arithmetic.as_argument(parameter)) for parameter in self.packed
            ]
        return self._trace(run, arguments)

    def definitions(self) -> dict[str, fx.GraphModule]:
        """Trace the definitions of the named operators in the graphs traced so far."""
        definitions = self.named.definitions if self.named else []
        return {entry.name: self._trace(entry.function, entry.inputs) for entry in definitions}

    def _trace(self, run: Callable[..., object], arguments: Sequence[Tensor]) -> fx.GraphModule:
        with torch.no_grad():
            graph_module = make_fx(run, self._decompositions, tracing_mode="fake")(*arguments)
        replace_puts_by_slices(graph_module.graph)
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        return graph_module

    def _inputs(self, function: FunctionSpec) -> list[Tensor]:
        shapes = map(state_shape, self.program.states)
        tokens, start = (torch.zeros(n, dtype=torch.int32) for n in (function.tokens, 1))
        return [tokens, start, *map(torch.zeros, shapes)]

    def _collect_parameters(self, function: FunctionSpec) -> None:
        """Run a function on fake tensors, so that the constants collect its parameters."""
        with FakeTensorMode(), torch.no_grad():
            forms = Forms(
                self.program,
                self.constants,
                lambda parameter: _empty(self._as_argument(parameter)),
                self.arithmetic,
            )
            tokens, start, *states = self._inputs(function)
            run_program(forms, tokens, start, states, last_only=False)

    def _as_argument(self, parameter: Parameter) -> Parameter:
        """Return the dtype and shape of a parameter as an argument; zero points are unpacked."""
        if _zero_point_bits(parameter):
            return replace(
                parameter, shape=(*parameter.shape[:-3], ROWS), dtype=self.arithmetic.dtype
            )
        return self.arithmetic.as_argument(parameter)


def _zero_point_bits(parameter: Parameter) -> int:
    """Return the bits of packed zero points, or 0 for another parameter."""
    _, _, suffix = parameter.name.partition("#zeros:")
    return int(suffix.split(":")[0]) if suffix else 0


def _empty(parameter: Parameter) -> Tensor:
    return torch.empty(parameter.shape, dtype=DTYPES[parameter.dtype][1])
