"""Operators of a program as torch operators of fixed shapes that accelerators support.

`lfmc.targets.npu.interface` describes the inputs and outputs of a graph. `read_constant` returns a
constant by the names of its checkpoint tensors; matrices are `[K, N]`. `round_value` is called for
every value that an operator computes, because the target rounds each of them. The name of a value
is the same for every number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from lfmc.graph.program import Program
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import MATRIX
from lfmc.targets.shared.plain_torch import ConstantRef

ReadConstant = Callable[[tuple[str, ...]], Tensor]
RoundValue = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class Style:
    """The form of operators that a target does not support as a whole.

    `by_taps` writes filters as products and sums, for targets without 16-bit convolutions.
    `by_parts` writes norms, softmax and top-k in elementary operators.
    """

    by_taps: bool = False
    by_parts: bool = False


DEFAULT_STYLE, BY_TAPS = Style(), Style(by_taps=True)


@dataclass(frozen=True)
class State:
    """A state before the call.

    The values that a call adds to a state are rounded under the state's name, because both are in
    one buffer.
    """

    name: str
    value: Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a kind of attention layer; the host provides its angles."""

    kind: str


class Forms:
    """Access of handlers to the inputs of a call, to constants, and to the rounding of values."""

    def __init__(
        self,
        program: Program,
        interface: Interface,
        read_constant: ReadConstant,
        round_value: RoundValue,
        style: Style = DEFAULT_STYLE,
    ) -> None:
        self.program, self.interface, self.style = program, interface, style
        self.read_constant, self._round_value = read_constant, round_value
        self.inputs: Mapping[str, Tensor] = {}
        self._node_name = ""

    def start_call(self, inputs: Mapping[str, Tensor]) -> None:
        """Round and store the inputs of a call, by name."""
        self.inputs = {name: self.round_input(value, name) for name, value in inputs.items()}

    def enter(self, node: fx.Node) -> None:
        """Name the values that follow after this operator."""
        self._node_name = node.name

    def round_input(self, value: Tensor, name: str) -> Tensor:
        return self._round_value(value, name)

    def round(self, value: Tensor, part: str = "") -> Tensor:
        """Round a value that the current operator computes."""
        return self._round_value(value, f"{self._node_name}.{part}" if part else self._node_name)

    def round_state(self, value: Tensor, state: State) -> Tensor:
        """Round the values that a call adds to a state, with the step of the state."""
        return self._round_value(value, state.name)

    def linear(self, x: Tensor, weight: ConstantRef, part: str = "") -> Tensor:
        """Return the rounded product of `x` `[..., K]` and a matrix `[K, N]`.

        A float matrix is rounded like a value.
        """
        return self.round(self.matmul(x, self.load_matrix(weight)), part)

    def matmul(self, x: Tensor, matrix: Tensor) -> Tensor:
        return x @ matrix

    def load_matrix(self, weight: ConstantRef) -> Tensor:
        (name,) = weight.sources
        value = self.read_constant(weight.sources)
        return self._round_value(value, name + MATRIX) if weight.part == "values" else value

    def load_constant(self, constant: ConstantRef) -> Tensor:
        """Return a constant of elementwise operators, rounded like a value."""
        return self._round_value(self.read_constant(constant.sources), "+".join(constant.sources))

    def scalar(self, value: float) -> float | Tensor:
        """Return a number that is an operand of a value."""
        return value

    def zero(self, part: str) -> float | Tensor:
        """Return a zero with the step of a part of the current operator."""
        return 0.0
