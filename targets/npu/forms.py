"""A program as plain torch of fixed shapes, in forms that accelerators take.

A graph is that of `lfmc.targets.npu.interface`. Constants come from `given`, by the tensors of the
checkpoint that they are made of, matrices as `[K, N]`. `keep` is told every value that an operator
computes, by a name that is the same for every number of tokens: a place where a target rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from lfmc.graph.program import Program
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import MATRIX
from lfmc.targets.shared.plain_torch import Held

Given = Callable[[tuple[str, ...]], Tensor]
Keep = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class Style:
    """`by_taps` writes filters as products and sums, for where convolutions have no 16 bits;
    `by_parts` writes norms, softmax and top-k as what they are made of, for where they have no
    operators of their own."""

    by_taps: bool = False
    by_parts: bool = False


PLAIN, BY_TAPS = Style(), Style(by_taps=True)


@dataclass(frozen=True)
class State:
    """A state as it was before the call. What is added to it is kept under the same name: both
    lie in one memory."""

    name: str
    value: Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary steps of a kind of attention layer: the host brings their angles."""

    kind: str


class Forms:
    """What the forms of operators share: a call's inputs, constants, and rounding of values."""

    def __init__(
        self,
        program: Program,
        interface: Interface,
        given: Given,
        keep: Keep,
        style: Style = PLAIN,
    ) -> None:
        self.program, self.interface, self.style = program, interface, style
        self.given, self._keep = given, keep
        self.inputs: Mapping[str, Tensor] = {}
        self._name = ""

    def begin(self, inputs: Mapping[str, Tensor]) -> None:
        """Take a call's inputs, by name."""
        self.inputs = {name: self.taken(value, name) for name, value in inputs.items()}

    def at(self, node: fx.Node) -> None:
        """From here on values are those of this operator."""
        self._name = node.name

    def taken(self, value: Tensor, name: str) -> Tensor:
        """An input, rounded as the target does."""
        return self._keep(value, name)

    def keep(self, value: Tensor, part: str = "") -> Tensor:
        """A value that the operator at hand computes, rounded as the target does."""
        return self._keep(value, f"{self._name}.{part}" if part else self._name)

    def added(self, value: Tensor, state: State) -> Tensor:
        """What a call adds to a state, rounded as that is."""
        return self._keep(value, state.name)

    def product(self, x: Tensor, weight: Held, part: str = "") -> Tensor:
        """`x` `[..., K]` times a matrix, which is given as `[K, N]`; one of floats is rounded like
        a value."""
        return self.keep(self.multiplied(x, self.matrix(weight)), part)

    def multiplied(self, x: Tensor, matrix: Tensor) -> Tensor:
        return x @ matrix

    def matrix(self, weight: Held) -> Tensor:
        (name,) = weight.sources
        value = self.given(weight.sources)
        return self._keep(value, name + MATRIX) if weight.part == "values" else value

    def small(self, held: Held) -> Tensor:
        """A constant that takes part in arithmetic of values, and is rounded like one."""
        return self._keep(self.given(held.sources), "+".join(held.sources))

    def number(self, value: float) -> float | Tensor:
        """A number that takes part in arithmetic of values."""
        return value

    def zero(self, part: str) -> float | Tensor:
        """A zero with the step of a part of the operator at hand."""
        return 0.0
