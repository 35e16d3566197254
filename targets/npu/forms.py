"""A program as plain torch of fixed shapes, in forms that accelerators take.

A graph is that of `lfmc.targets.npu.interface`. Constants come from `given`, by the tensors of the
checkpoint that they are made of, matrices as `[K, N]`. `keep` is told every value that an operator
computes, by a name that is the same for every number of tokens: a place where a target rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.passes.pattern import arguments
from lfmc.program import Program, operator_name
from lfmc.targets.npu.handlers import HANDLERS
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import MATRIX, SIGMOID
from lfmc.targets.plain import Held, call_plain

Given = Callable[[tuple[str, ...]], Tensor]
Keep = Callable[[Tensor, str], Tensor]
MOVING = ("aten.view", "aten.reshape", "aten.transpose", "aten.permute", "aten.unsqueeze")


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
    """Runs a program as an accelerator does; traced, that is its graph."""

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

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, of inputs by name."""
        self.inputs = {name: self.taken(value, name) for name, value in inputs.items()}
        graph = self.program.graph
        tokens, positions, *states = self.program.inputs
        names = (spec.identifier for spec in self.interface.states)
        held = [State(name, self.inputs[name]) for name in names]
        known: dict[fx.Node, Any] = dict(zip(states, held, strict=True))
        known[tokens] = torch.zeros(1, self.interface.tokens, dtype=torch.int32)  # its shape
        known[positions] = None
        for node in graph.nodes:
            if node.op == "get_attr":
                known[node] = self._held(node)
            elif node.op == "call_function":
                known[node] = self._call(node, known)
        logits, *news = arguments(graph.output_node())[0]
        outputs = (known[logits], *(known[node] for node in news))
        return dict(zip(self.interface.outputs, outputs, strict=True))

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

    def _held(self, node: fx.Node) -> Held | Rope:
        weight = self.program.weights[str(node.target)]
        if weight.part == "constant":
            return Rope(str(node.target).removeprefix("rope."))
        return Held(weight.sources, weight.part)

    def _call(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        name, self._name = operator_name(node), node.name
        args = fx.map_arg(arguments(node), known.__getitem__)
        if name in HANDLERS:
            return HANDLERS[name](self, *args)
        made = call_plain(node, known, self.small, "accelerators'")
        floats = isinstance(made, Tensor) and made.is_floating_point()
        part = SIGMOID if name == "aten.sigmoid" else ""
        return self.keep(made, part) if floats and name not in MOVING else made
