"""Lowering of the fused program to steps, and the values that its operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.machine.mapped import map_tensor
from lfmc.model import StateSpec
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.targets.base import StoredTensor, find_handler
from lfmc.targets.executorch.assemble import AssembledProgram, assemble
from lfmc.targets.executorch.recorder import Recorder, numel_per_token, scalar
from lfmc.targets.executorch.steps import (
    Constant,
    Input,
    Integer,
    Length,
    Matrix,
    RuntimeStep,
    State,
    Step,
    Value,
    constant,
    order_steps,
)
from lfmc.targets.executorch.stored import stored_matrix, stored_tensor

# Far more than the difference of attention scores, and far less than float32's largest number.
MASK_PENALTY = 1e9

Handler = Callable[["Lowering", fx.Node], Any]


class Lowering:
    """The steps of `forward(tokens [1, T] int64, start_pos [1] int64) -> logits [1, T, V] float32`.

    T is at most `chunk`. With `last_only` the logits are `[1, 1, V]`. Constants are mapped from
    files in the folder `scratch`, or stay in memory.

    A conversation begins at position 0, where the filter states of the previous conversation are
    multiplied by 0. Keys and values need no reset: attention only reads slots up to the position.
    """

    def __init__(
        self,
        program: Program,
        weights: PlannedWeights,
        context: int,
        chunk: int,
        handlers: Mapping[str, Handler],
        *,
        last_only: bool = False,
        scratch: Path | None = None,
    ) -> None:
        self.program, self.weights, self.context = program, weights, context
        self.length = Length(chunk)
        self._scratch = scratch
        self.recorder = Recorder()
        self.stored_tensors: list[StoredTensor] = []
        self._constants: dict[Any, Any] = {}
        self._cache: dict[Any, Any] = {}
        tokens, positions, *states = program.inputs
        self.tokens = Input((1, self.length), torch.int64)
        self.start_pos = Input((1,), torch.int64)
        self.states = {
            node: State(state_shape(spec), zeros=spec.kind == "conv")
            for node, spec in zip(states, program.states, strict=True)
        }
        self.start, self.count, self.end = Integer(), Integer(), Integer()
        self.call_integer("aten::_local_scalar_dense", (self.start_pos,), self.start)
        self.call_integer("aten::sym_size.int", (self.tokens, 1), self.count)
        self.call_integer("executorch_prim::add.Scalar", (self.start, self.count), self.end)
        self.results: dict[fx.Node, Any] = {tokens: self.tokens, positions: None}
        head: fx.Node = arguments(program.graph.output_node())[0][0]
        for node in program.graph.nodes:
            if node.op == "call_function":
                if node is head and last_only:
                    self._select_last_token(arguments(node)[0])
                self.results[node] = find_handler(handlers, node, "ExecuTorch")(self, node)
        self.logits: Value = self.results[head]

    def _select_last_token(self, node: fx.Node) -> None:
        """Replace a node's value by its row of the last token, `[1, 1, H]`."""
        hidden, last = self.value(node), Integer()
        self.call_integer("executorch_prim::sub.Scalar", (self.count, 1), last)
        args = (hidden, 1, last, self.count, 1)
        self.results[node] = self.call(
            "aten::slice_copy.Tensor_out", args, (1, 1, hidden.shape[-1])
        )

    def assemble(self, facts: Mapping[str, Any]) -> AssembledProgram:
        """Return the program; each fact becomes a method without arguments."""
        inputs = (self.tokens, self.start_pos)
        return assemble(order_steps(self.recorder.steps, inputs), inputs, [self.logits], facts)

    def value(self, node: Any) -> Any:
        """Return a node's result: a value, several values, or a plain number."""
        if not isinstance(node, fx.Node):
            return node
        return self.floats(node) if node.op == "get_attr" else self.results[node]

    def floats(self, node: fx.Node, kind: str = "float32") -> Constant:
        """Return a float constant in the layout of a `kind` of `lfmc.targets.executorch.stored`."""
        sources = self.sources(node)

        def make() -> tuple[Constant, list[StoredTensor]]:
            data = self._map(ARRANGEMENTS[kind](self.weights.floats(sources)).contiguous())
            return constant(data), [stored_tensor(kind, data, "values", sources)]

        return self.constant(node.target, make)  # type: ignore[no-any-return]

    def matrix(self, codes: fx.Node) -> Matrix:
        """Return the n-bit weight of a codes node."""
        sources = self.sources(codes)

        def make() -> tuple[Matrix, list[StoredTensor]]:
            packed = self.weights.packed(sources)
            bits, group = packed.format.bits, packed.format.columns_per_group(packed.shape[1])
            data = packed.packed_codes() if bits == 4 else packed.signed_codes()
            matrix = Matrix(packed.shape, bits, group, self._map(data), self._map(packed.scales))
            return matrix, stored_matrix(matrix, sources)

        return self.constant((codes.target, "matrix"), make)  # type: ignore[no-any-return]

    def _map(self, data: Tensor) -> Tensor:
        return data if self._scratch is None else map_tensor(data, self._scratch)

    def sources(self, node: fx.Node) -> tuple[str, ...]:
        """Return the names of the checkpoint tensors of a constant."""
        return self.program.weights[str(node.target)].sources

    def constant(self, key: Any, make: Callable[[], tuple[Any, list[StoredTensor]]]) -> Any:
        """Return the constant of a key; at the first call, make and record it."""
        if key not in self._constants:
            self._constants[key], parts = make()
            self.stored_tensors += parts
        return self._constants[key]

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the value of a key that several operators share; make it at the first call."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def call(
        self, name: str, args: Sequence[Any], shape: Sequence[Any], dtype: Any = torch.float32
    ) -> Value:
        """Record an operator of the runtime whose only output is its last argument."""
        result = Value(tuple(shape), dtype)
        work = numel_per_token(result.shape)
        step = RuntimeStep(name, (*args, result), (result,), (result,), work=work)
        self.recorder.steps.append(step)
        return result

    def call_integer(self, name: str, args: Sequence[Any], result: Integer) -> None:
        """Record an operator of the runtime that returns an integer."""
        self.recorder.steps.append(RuntimeStep(name, tuple(args), (result,), (result,)))

    @contextmanager
    def record_steps(self) -> Iterator[list[Step]]:
        """Collect the steps recorded in a `with` block in a separate list."""
        outer, self.recorder = self.recorder, Recorder()
        try:
            yield self.recorder.steps
        finally:
            self.recorder = outer

    def state_factor(self) -> Value:
        """Return float32 `[1]`: 0 in the first call of a conversation, else 1."""

        def make() -> Value:
            nonzero = self.call("aten::ne.Scalar_out", (self.start_pos, 0), (1,), torch.bool)
            return self.call("aten::_to_copy.out", (nonzero, False, None), (1,))

        return self.cached("state_factor", make)  # type: ignore[no-any-return]

    def positions(self) -> Value:
        """Return the positions of the tokens, float32 `[T, 1]`."""

        def make() -> Value:
            flat = self.call("aten::arange.start_out", (self.start, self.end, 1), (self.length,))
            return self.call("aten::unsqueeze_copy.out", (flat, 1), (self.length, 1))

        return self.cached("positions", make)  # type: ignore[no-any-return]

    def rotary_tables(self, kind: str) -> tuple[Value, Value]:
        """Return cosines and sines of the rotary angles, float32 `[1, T, 1, D / 2]`."""

        def make() -> tuple[Value, Value]:
            frequencies = inverse_frequencies(self.program.config, kind)
            half = frequencies.numel()
            angles = self.call(
                "aten::mul.out",
                (self.positions(), constant(frequencies.view(1, half))),
                (self.length, half),
            )
            shape = (1, self.length, 1, half)
            names = ("aten::cos.out", "aten::sin.out")
            parts = (self.call(name, (angles,), (self.length, half)) for name in names)
            cos, sin = (self.recorder.reshape(part, shape) for part in parts)
            return cos, sin

        return self.cached(("rotary_tables", kind), make)  # type: ignore[no-any-return]

    def window_mask(self, size: int) -> Value:
        """Return an additive attention mask `[T, C]`: 0 for the last `size` slots."""

        def make() -> Value:
            recorder, slots = self.recorder, torch.arange(self.context, dtype=torch.float32)
            distance = recorder.subtract(self.positions(), constant(slots.view(1, -1)))
            zero = scalar(0.0)
            too_far = recorder.minimum(recorder.subtract(scalar(size - 1.0), distance), zero)
            outside = recorder.add(recorder.minimum(distance, zero), too_far)
            return recorder.multiply(outside, scalar(MASK_PENALTY))

        return self.cached(("window_mask", size), make)  # type: ignore[no-any-return]


def state_shape(spec: StateSpec) -> tuple[int, ...]:
    """Return a state's shape: a filter `[1, taps - 1, H]`, keys and values `[1, C, K, D]`."""
    batch, channels, *rest = spec.shape
    return (batch, rest[0], channels, *rest[1:])


def _unchanged(value: Tensor) -> Tensor:
    return value


def _transpose_taps(value: Tensor) -> Tensor:
    return value[:, 0].T


ARRANGEMENTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "float32": _unchanged,
    "taps": _transpose_taps,
}
