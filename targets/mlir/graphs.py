"""The library's functions as graphs of ATen operators, whose inputs are states and parameters.

decode    tokens int32 [1], start int32 [1], states, parameters -> logits [1, V], states
score_N   the same of N tokens -> logits [N, V], states
prefill_N the same -> logits [1, V] of the last, states
prepare   packed zero points -> one a byte; what the others take in place of them
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
from lfmc.targets.mlir.arithmetic import Dialect, with_slices
from lfmc.targets.mlir.constants import MlirConstants
from lfmc.targets.mlir.forms import Forms
from lfmc.targets.mlir.named import Named
from lfmc.targets.mlir.run_program import run_program
from lfmc.targets.shared.parameters_file import DTYPES, Parameter
from lfmc.targets.shared.row_blocks import ROWS

DECODE, PREPARE = "decode", "prepare"
SHORT = 8  # tokens of a call, where fewer than a chunk are left


@dataclass(frozen=True)
class Kind:
    """One of the functions that take tokens."""

    name: str
    tokens: int
    last_only: bool = False


def kinds(chunk: int) -> list[Kind]:
    """For one token, and for calls of two lengths."""
    found = [Kind(DECODE, 1)]
    for count in sorted({min(SHORT, chunk), chunk}):
        found.append(Kind(f"score_{count}", count))
        found.append(Kind(f"prefill_{count}", count, last_only=True))
    return found


def state_shape(spec: StateSpec) -> tuple[int, ...]:
    """Of a filter `[taps - 1, H]`, of keys `[K, D, C]`, of values `[K, C, D]`."""
    if spec.kind == "conv":
        _, channels, back = spec.shape
        return back, channels
    _, heads, slots, dim = spec.shape
    return (heads, dim, slots) if spec.kind == "key" else (heads, slots, dim)


class Graphs:
    """All functions of a program; `parameters` is what they take behind the states, in order."""

    def __init__(
        self,
        program: Program,
        constants: MlirConstants,
        chunk: int,
        dialect: Dialect,
        decompositions: Mapping[Any, Callable[..., Any]],
        named: Named | None,
    ) -> None:
        self.program, self.constants, self.dialect = program, constants, dialect
        self.named = named
        self.kinds, self._decompositions = kinds(chunk), decompositions
        for kind in self.kinds[:2]:  # what one token takes, and several
            self._ask_for_parameters(kind)
        self.parameters = list(constants.parameters.values())
        self.packed = [own for own in self.parameters if _bits_of_zeros(own)]
        self.given = [self._as_given(own) for own in self.parameters]

    def graph(self, kind: Kind) -> fx.GraphModule:
        """One function."""
        names, count = [own.name for own in self.parameters], len(self.program.states)

        def run(tokens: Tensor, start: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(names, rest[count:], strict=True))
            forms = Forms(self.program, self.constants, lambda own: values[own.name], self.dialect)
            states, last_only = rest[:count], kind.last_only
            return run_program(forms, tokens, start, states, last_only=last_only, named=self.named)

        with FakeTensorMode():
            given = [*self._inputs(kind), *map(_empty, self.given)]
        return self._traced(run, given)

    def prepare(self) -> fx.GraphModule:
        """What unpacks zero points."""

        def run(*packed: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                self.dialect.zeros(value, _bits_of_zeros(own), own.shape)
                for value, own in zip(packed, self.packed, strict=True)
            )

        with FakeTensorMode():
            given = [_empty(self.dialect.as_given(own)) for own in self.packed]
        return self._traced(run, given)

    def definitions(self) -> dict[str, fx.GraphModule]:
        """What named operators of the graphs that were made stand for."""
        made = self.named.definitions if self.named else []
        return {own.name: self._traced(own.function, own.inputs) for own in made}

    def _traced(self, run: Callable[..., object], given: Sequence[Tensor]) -> fx.GraphModule:
        with torch.no_grad():
            made = make_fx(run, self._decompositions, tracing_mode="fake")(*given)
        with_slices(made.graph)
        made.graph.eliminate_dead_code()
        made.recompile()
        return made

    def _inputs(self, kind: Kind) -> list[Tensor]:
        shapes = map(state_shape, self.program.states)
        tokens, start = (torch.zeros(n, dtype=torch.int32) for n in (kind.tokens, 1))
        return [tokens, start, *map(torch.zeros, shapes)]

    def _ask_for_parameters(self, kind: Kind) -> None:
        with FakeTensorMode(), torch.no_grad():
            forms = Forms(
                self.program,
                self.constants,
                lambda own: _empty(self._as_given(own)),
                self.dialect,
            )
            tokens, start, *states = self._inputs(kind)
            run_program(forms, tokens, start, states, last_only=False)

    def _as_given(self, own: Parameter) -> Parameter:
        """What functions take for a parameter: zero points are prepared."""
        if _bits_of_zeros(own):
            return replace(own, shape=(*own.shape[:-3], ROWS), dtype=self.dialect.dtype)
        return self.dialect.as_given(own)


def _bits_of_zeros(own: Parameter) -> int:
    """Bits of zero points, 0 of another parameter."""
    _, _, form = own.name.partition("#zeros:")
    return int(form.split(":")[0]) if form else 0


def _empty(own: Parameter) -> Tensor:
    return torch.empty(own.shape, dtype=DTYPES[own.dtype][1])
