"""Lower a fused program to an ONNX graph.

This module rounds nothing and chooses no bits. It writes the codes of `PackedTensor` to the file,
reordered if a kernel needs another order.
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
from lfmc.targets.onnx.emitter import NUM_LOGITS, Emitter
from lfmc.targets.onnx.layouts import Layout

Result = ir.Value | Sequence[ir.Value] | None
Handler = Callable[["Lowering", fx.Node], Result]


@dataclass
class Lowering:
    """The lowering of one program; `handlers` maps each operator to the function that lowers it."""

    program: Program
    weights: PlannedWeights
    layout: Layout
    context: int
    accuracy_level: int
    emitter: Emitter
    handlers: Mapping[str, Handler]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    flat_heads: dict[fx.Node, ir.Value] = field(default_factory=dict)
    probe_values: list[tuple[fx.Node, str, tuple[ir.Value, ...], ir.Value]] = field(
        default_factory=list
    )

    def run(self) -> None:
        """Declare the inputs, emit every node, and declare the outputs in the program's order."""
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                self._outputs(node)

    def value(self, node: Any) -> ir.Value:
        """Return the graph value of a node. A constant is written at its first use."""
        if node not in self.values:
            self.values[node] = self.float_weight(node)
        value = self.values[node]
        if not isinstance(value, ir.Value):
            raise UnsupportedError("the input of an ONNX operator is not a tensor", got=str(node))
        return value

    def float_weight(self, node: fx.Node) -> ir.Value:
        """Write a constant that stays float, in the dtype of the plan."""
        name = str(node.target)
        sources = self.program.weights[name].sources
        return self.emitter.weight(name, "values", sources, self.weights.floats(sources), "rows")

    def quantized(self, codes: fx.Node) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Write a quantized weight: codes uint8 `[N, bytes]`, scales and zero points."""
        name = str(codes.target).removesuffix(".codes")
        sources = self.program.weights[str(codes.target)].sources
        packed = self.weights.packed(sources)
        zeros = packed.packed_zeros()
        write = self.emitter.weight
        return (
            write(name, "codes", sources, packed.packed_codes(), "rows"),
            write(name, "scales", sources, packed.scales, "rows"),
            None if zeros is None else write(name, "zeros", sources, zeros, "rows"),
        )

    def head_input(self, node: fx.Node, x: ir.Value) -> ir.Value:
        """Return the rows of `x` `[B, T, H]` for which the matmul `node` computes results.

        These are all rows. If `node` computes the logits and the layout has `num_logits_to_keep`,
        these are the last rows; 0 keeps all.
        """
        output = self.program.graph.output_node()
        if not self.layout.runs_in_browsers or arguments(output)[0][0] is not node:
            return x
        emitter = self.emitter
        start = emitter.op("Unsqueeze", emitter.op("Neg", self.num_logits), emitter.ints(0))
        return emitter.op("Slice", x, start, emitter.ints(2**62), emitter.ints(1))

    def probe(self, node: fx.Node, kind: str, inputs: Sequence[Any], output: ir.Value) -> ir.Value:
        """Record an n-bit operator for operator parity, and return its output."""
        self.probe_values.append((node, kind, tuple(map(self.value, inputs)), output))
        return output

    def probes(self) -> tuple[Probe, ...]:
        """Return the recorded operators with the value names of the saved graph."""
        return tuple(
            Probe(node.name, kind, tuple(str(v.name) for v in inputs), str(output.name))
            for node, kind, inputs, output in self.probe_values
        )

    def _inputs(self) -> None:
        emitter, int64 = self.emitter, ir.DataType.INT64
        tokens, positions, *states = self.program.inputs
        batch = self.layout.batch
        self.values[tokens] = emitter.input("input_ids", int64, [batch, "time"])
        self.values[positions] = None  # attention derives positions from the mask
        mask = emitter.input("attention_mask", int64, [batch, "total"])
        # All rows have equal length: the last position of a row is its number of ones minus one.
        last = emitter.op(
            "Sub", emitter.op("ReduceSum", mask, emitter.ints(1), keepdims=0), emitter.ints(1)
        )
        self.last = emitter.op("Cast", last, to=int(ir.DataType.INT32))
        total = emitter.op("Squeeze", emitter.op("Shape", mask, start=1, end=2))
        self.total = emitter.op("Cast", total, to=int(ir.DataType.INT32))
        if self.layout.runs_in_browsers:
            self.num_logits = emitter.input(NUM_LOGITS, int64, [])
        for node, state in zip(states, self.program.states, strict=True):
            shape = self.layout.shape(state, "past")
            self.values[node] = emitter.input(self.layout.past(state), ir.DataType.FLOAT, shape)

    def _outputs(self, node: fx.Node) -> None:
        logits, *states = arguments(node)[0]
        time = "logits_to_keep" if self.layout.runs_in_browsers else "time"
        shape: list[int | str] = [self.layout.batch, time, self.program.config.vocab_size]
        self.emitter.output(self.value(logits), "logits", shape)
        for value, state in zip(states, self.program.states, strict=True):
            name, dims = self.layout.present(state), self.layout.shape(state, "total")
            self.emitter.output(self.value(value), name, dims)

    def _call(self, node: fx.Node) -> Result:
        return find_handler(self.handlers, node, "ONNX")(self, node)
