"""From a fused program to an ONNX graph, and what its operators share.

Nothing is rounded and no bits are chosen here; codes go into the file as `PackedTensor` has them,
reordered where a kernel wants another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from torch import fx

from lfmc.errors import UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.passes.pattern import arguments
from lfmc.targets.base import Probe, find_handler
from lfmc.targets.onnx.emitter import Emitter
from lfmc.targets.onnx.layouts import Layout

Result = ir.Value | Sequence[ir.Value] | None
Handler = Callable[["Lowering", fx.Node], Result]


@dataclass
class Lowering:
    """One program on its way into a graph; `handlers` has a function for each operator."""

    program: Program
    weights: PlannedWeights
    layout: Layout
    context: int
    accuracy_level: int
    emit: Emitter
    handlers: Mapping[str, Handler]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    flat_heads: dict[fx.Node, ir.Value] = field(default_factory=dict)
    probed: list[tuple[fx.Node, str, tuple[ir.Value, ...], ir.Value]] = field(default_factory=list)

    def run(self) -> None:
        """Emit every node; inputs are declared first, outputs in the order of the program."""
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                self._outputs(node)

    def value(self, node: Any) -> ir.Value:
        """The graph value of a node; constants are written when they are first asked for."""
        if node not in self.values:
            self.values[node] = self.float_weight(node)
        value = self.values[node]
        if not isinstance(value, ir.Value):
            raise UnsupportedError("an ONNX operator got no tensor", got=str(node))
        return value

    def float_weight(self, node: fx.Node) -> ir.Value:
        """A constant that stays float, in the dtype that the plan stores it in."""
        name = str(node.target)
        sources = self.program.weights[name].sources
        return self.emit.weight(name, "values", sources, self.weights.floats(sources), "rows")

    def quantized(self, codes: fx.Node) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Codes uint8 `[N, bytes]`, scales and zero points of the weight behind a codes node."""
        name = str(codes.target).removesuffix(".codes")
        sources = self.program.weights[str(codes.target)].sources
        packed = self.weights.packed(sources)
        zeros = packed.packed_zeros()
        write = self.emit.weight
        return (
            write(name, "codes", sources, packed.packed_codes(), "rows"),
            write(name, "scales", sources, packed.scales, "rows"),
            None if zeros is None else write(name, "zeros", sources, zeros, "rows"),
        )

    def probe(self, node: fx.Node, kind: str, inputs: Sequence[Any], output: ir.Value) -> ir.Value:
        """Note an n-bit operator, for a comparison of its own; returns its result."""
        self.probed.append((node, kind, tuple(map(self.value, inputs)), output))
        return output

    def probes(self) -> tuple[Probe, ...]:
        """Operators that were noted, by the names that the saved graph gave their values."""
        return tuple(
            Probe(node.name, kind, tuple(str(v.name) for v in inputs), str(output.name))
            for node, kind, inputs, output in self.probed
        )

    def _inputs(self) -> None:
        emit, int64 = self.emit, ir.DataType.INT64
        tokens, positions, *states = self.program.inputs
        self.values[tokens] = emit.input("input_ids", int64, ["batch", "time"])
        self.values[positions] = None  # attention counts positions by the mask
        mask = emit.input("attention_mask", int64, ["batch", "total"])
        # Rows are of equal length: a row's last position is its number of ones, less one.
        last = emit.op("Sub", emit.op("ReduceSum", mask, emit.ints(1), keepdims=0), emit.ints(1))
        self.last = emit.op("Cast", last, to=int(ir.DataType.INT32))
        total = emit.op("Squeeze", emit.op("Shape", mask, start=1, end=2))
        self.total = emit.op("Cast", total, to=int(ir.DataType.INT32))
        for node, state in zip(states, self.program.states, strict=True):
            shape = self.layout.shape(state, "past")
            self.values[node] = emit.input(self.layout.past(state), ir.DataType.FLOAT, shape)

    def _outputs(self, node: fx.Node) -> None:
        logits, *states = arguments(node)[0]
        shape: list[int | str] = ["batch", "time", self.program.config.vocab_size]
        self.emit.output(self.value(logits), "logits", shape)
        for value, state in zip(states, self.program.states, strict=True):
            name, dims = self.layout.present(state), self.layout.shape(state, "total")
            self.emit.output(self.value(value), name, dims)

    def _call(self, node: fx.Node) -> Result:
        return find_handler(self.handlers, node, "ONNX")(self, node)
