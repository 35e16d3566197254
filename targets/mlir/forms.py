"""A program as plain torch, and what the forms of its operators share.

Values are float32 `[1, T, width]` as in the program; states are `[taps - 1, H]` of a filter, keys
`[K, D, C]`, values `[K, C, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.program import Program, operator_name
from lfmc.targets.mlir.arithmetic import Dialect
from lfmc.targets.mlir.constants import Matrix, MlirConstants
from lfmc.targets.mlir.handlers import HANDLERS, up_to
from lfmc.targets.mlir.named import Given, Handler, Named
from lfmc.targets.plain import PASSED, Held, call_plain


@dataclass(frozen=True)
class Forms:
    """Runs a program with parameters that `given` supplies; traced, that is a graph of theirs.
    With `named` operators stay operators of that graph."""

    program: Program
    constants: MlirConstants
    given: Given
    dialect: Dialect
    named: Named | None = None

    def run(
        self, tokens: Tensor, start: Tensor, states: Sequence[Tensor], *, last_only: bool
    ) -> tuple[Tensor, ...]:
        """Logits `[T, V]`, or `[1, V]` of the last, of tokens int32 `[T]` that come at position
        `start` int32 `[1]`, and the new states."""
        positions = start + up_to(len(tokens))
        inputs = iter([tokens.unsqueeze(0), positions, *states])
        known: dict[fx.Node, Any] = {}
        results: Sequence[fx.Node] = arguments(self.program.graph.output_node())[0]
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(inputs)
            elif node.op == "get_attr":
                known[node] = self._held(node)
            elif node.op == "call_function":
                if node is results[0] and last_only:
                    hidden = node.all_input_nodes[0]
                    known[hidden] = known[hidden][:, -1:]
                known[node] = self._call(node, known)
        logits, *new = (known[node] for node in results)
        return (logits[0], *new)

    def _held(self, node: fx.Node) -> Any:
        """A constant; rotary steps follow from the configuration."""
        name = str(node.target)
        weight = self.program.weights[name]
        if weight.part != "constant":
            return Held(weight.sources)
        config, kind = self.program.config, name.removeprefix("rope.")
        return self.given(
            self.constants.of_config(name, lambda: inverse_frequencies(config, kind).float())
        )

    def _call(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        name = operator_name(node)
        if name in HANDLERS:
            args: Any = fx.map_arg(arguments(node), known.__getitem__)
            if self.named is None or name in PASSED:
                return HANDLERS[name](self, *args)
            return self.named.call(name.removeprefix("lfm."), self._handler(name), self.given, args)
        return call_plain(node, known, self.floats, "MLIR")

    def _handler(self, name: str) -> Handler:
        """The form of an operator, of what gives it parameters."""
        return lambda given, *args: HANDLERS[name](replace(self, given=given), *args)

    def floats(self, held: Held, *, taps: bool = False) -> Tensor:
        """A constant that stays float, in float32."""
        own = self.constants.floats(held.sources, taps=taps)
        return self.wide(self.given(own), own.dtype)

    def wide(self, value: Tensor, dtype: str) -> Tensor:
        """Float32 of a parameter of floats."""
        if dtype not in ("float16", "bfloat16"):
            return value

        def table(name: str, make: Callable[[], Tensor]) -> Tensor:
            return self.given(self.constants.of_config(name, make))

        return self.dialect.halves(value, dtype, table)

    def biased(self, value: Tensor, bias: Held | None) -> Tensor:
        """`value` and a bias, where there is one."""
        return value if bias is None else value + self.floats(bias)

    def zeros(self, matrix: Matrix) -> Tensor | None:
        """Zero points as `prepare` left them, `[..., G, 16]`."""
        return None if matrix.zeros is None else self.given(matrix.zeros)
