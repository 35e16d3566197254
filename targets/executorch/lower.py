"""The fused program as steps of ExecuTorch, and what its operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.model import StateSpec
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.targets.base import StoredTensor, find_handler
from lfmc.targets.executorch.assemble import Assembled, assemble
from lfmc.targets.executorch.recorder import Recorder, number, numel_at_one
from lfmc.targets.executorch.steps import (
    Constant,
    Given,
    Host,
    Length,
    Matrix,
    Number,
    State,
    Step,
    Value,
    arrange,
    constant,
)
from lfmc.targets.executorch.stored import matrix_parts, stored

# Far more than scores of attention differ by, and far less than float32's largest number.
FAR = 1e9

Handler = Callable[["Lowering", fx.Node], Any]


class Lowering:
    """`forward(tokens [1, T] int64, start_pos [1] int64) -> logits [1, T, V] float32`, T up to
    `chunk`, step by step; with `last_only` logits `[1, 1, V]`.

    A conversation begins at position 0, where the filters' states of the one before it count for
    nothing. Keys and values need no reset: only slots up to the position are seen.
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
    ) -> None:
        self.program, self.weights, self.context = program, weights, context
        self.length = Length(chunk)
        self.recorder = Recorder()
        self.stored: list[StoredTensor] = []
        self._constants: dict[Any, Any] = {}
        self._once: dict[Any, Any] = {}
        tokens, positions, *states = program.inputs
        self.tokens = Given((1, self.length), torch.int64)
        self.start_pos = Given((1,), torch.int64)
        self.states = {
            node: State(state_shape(spec), zeros=spec.kind == "conv")
            for node, spec in zip(states, program.states, strict=True)
        }
        self.start, self.count, self.end = Number(), Number(), Number()
        self.number("aten::_local_scalar_dense", (self.start_pos,), self.start)
        self.number("aten::sym_size.int", (self.tokens, 1), self.count)
        self.number("executorch_prim::add.Scalar", (self.start, self.count), self.end)
        self.results: dict[fx.Node, Any] = {tokens: self.tokens, positions: None}
        head: fx.Node = arguments(program.graph.output_node())[0][0]
        for node in program.graph.nodes:
            if node.op == "call_function":
                if node is head and last_only:
                    self._only_last(arguments(node)[0])
                self.results[node] = find_handler(handlers, node, "ExecuTorch")(self, node)
        self.logits: Value = self.results[head]

    def _only_last(self, node: fx.Node) -> None:
        """Have a node stand for the last token's part of it, `[1, 1, H]`."""
        hidden, before = self.value(node), Number()
        self.number("executorch_prim::sub.Scalar", (self.count, 1), before)
        args = (hidden, 1, before, self.count, 1)
        self.results[node] = self.host(
            "aten::slice_copy.Tensor_out", args, (1, 1, hidden.shape[-1])
        )

    def assemble(self, facts: Mapping[str, Any]) -> Assembled:
        given = (self.tokens, self.start_pos)
        return assemble(arrange(self.recorder.steps, given), given, [self.logits], facts)

    def value(self, node: Any) -> Any:
        """What a node stands for: a value, several, or a plain number."""
        if not isinstance(node, fx.Node):
            return node
        return self.floats(node) if node.op == "get_attr" else self.results[node]

    def floats(self, node: fx.Node, kind: str = "float32", copy: int = 0) -> Constant:
        """A constant that stays float, arranged as a `kind` of `stored` has it."""
        sources = self.sources(node)

        def make() -> tuple[Constant, list[StoredTensor]]:
            found = ARRANGED[kind](self.weights.floats(sources)).contiguous()
            return constant(found), [stored(kind, found, "values", sources, copy)]

        return self.constant((node.target, copy), make)  # type: ignore[no-any-return]

    def matrix(self, codes: fx.Node) -> Matrix:
        """The n-bit weight behind a codes node."""
        sources = self.sources(codes)

        def make() -> tuple[Matrix, list[StoredTensor]]:
            packed = self.weights.packed(sources)
            bits, span = packed.format.bits, packed.format.span(packed.shape[1])
            held = packed.packed_codes() if bits == 4 else packed.signed_codes()
            matrix = Matrix(packed.shape, bits, span, held, packed.scales)
            return matrix, matrix_parts(packed, sources)

        return self.constant((codes.target, "matrix"), make)  # type: ignore[no-any-return]

    def sources(self, node: fx.Node) -> tuple[str, ...]:
        """The checkpoint's tensors behind a constant."""
        return self.program.weights[str(node.target)].sources

    def constant(self, key: Any, make: Callable[[], tuple[Any, list[StoredTensor]]]) -> Any:
        """A constant, made and noted down when first asked for."""
        if key not in self._constants:
            self._constants[key], parts = make()
            self.stored += parts
        return self._constants[key]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several operators share."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def host(
        self, name: str, args: Sequence[Any], shape: Sequence[Any], dtype: Any = torch.float32
    ) -> Value:
        """An operator of the runtime with one output, the last of its arguments."""
        made = Value(tuple(shape), dtype)
        work = numel_at_one(made.shape)
        self.recorder.steps.append(Host(name, (*args, made), (made,), (made,), work=work))
        return made

    def number(self, name: str, args: Sequence[Any], made: Number) -> None:
        self.recorder.steps.append(Host(name, tuple(args), (made,), (made,)))

    @contextmanager
    def apart(self) -> Iterator[list[Step]]:
        """Steps that are recorded meanwhile go to a list of their own."""
        before, self.recorder = self.recorder, Recorder()
        try:
            yield self.recorder.steps
        finally:
            self.recorder = before

    def begun(self) -> Value:
        """1, and 0 in the first call of a conversation: float32 `[1]`."""

        def make() -> Value:
            moved = self.host("aten::ne.Scalar_out", (self.start_pos, 0), (1,), torch.bool)
            return self.host("aten::_to_copy.out", (moved, False, None), (1,))

        return self.once("begun", make)  # type: ignore[no-any-return]

    def positions(self) -> Value:
        """Float32 `[T, 1]`."""

        def make() -> Value:
            flat = self.host("aten::arange.start_out", (self.start, self.end, 1), (self.length,))
            return self.host("aten::unsqueeze_copy.out", (flat, 1), (self.length, 1))

        return self.once("positions", make)  # type: ignore[no-any-return]

    def turns(self, kind: str) -> tuple[Value, Value]:
        """Cosines and sines of a kind of layer's angles, float32 `[1, T, 1, D / 2]`."""

        def make() -> tuple[Value, Value]:
            steps = inverse_frequencies(self.program.config, kind)
            half = steps.numel()
            angles = self.host(
                "aten::mul.out",
                (self.positions(), constant(steps.view(1, half))),
                (self.length, half),
            )
            shape = (1, self.length, 1, half)
            names = ("aten::cos.out", "aten::sin.out")
            parts = (self.host(name, (angles,), (self.length, half)) for name in names)
            cos, sin = (self.recorder.reshape(part, shape) for part in parts)
            return cos, sin

        return self.once(("turns", kind), make)  # type: ignore[no-any-return]

    def window(self, size: int) -> Value:
        """What is added to scores `[T, C]`: 0 where a slot is one of the last `size`."""

        def make() -> Value:
            inner, slots = self.recorder, torch.arange(self.context, dtype=torch.float32)
            back = inner.subtract(self.positions(), constant(slots.view(1, -1)))
            none = number(0.0)
            over = inner.minimum(inner.subtract(number(size - 1.0), back), none)
            return inner.multiply(inner.add(inner.minimum(back, none), over), number(FAR))

        return self.once(("window", size), make)  # type: ignore[no-any-return]


def state_shape(spec: StateSpec) -> tuple[int, ...]:
    """Of a filter `[1, taps - 1, H]`, of keys and values `[1, C, K, D]`."""
    batch, channels, *rest = spec.shape
    return (batch, rest[0], channels, *rest[1:])


def _as_is(value: Tensor) -> Tensor:
    return value


def _taps(value: Tensor) -> Tensor:
    return value[:, 0].T


ARRANGED: Mapping[str, Callable[[Tensor], Tensor]] = {"float32": _as_is, "taps": _taps}
