"""One Relax function over kernels, as it is written operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from tvm import relax, tirx

from lfmc.model import StateSpec
from lfmc.passes.pattern import arguments
from lfmc.targets.base import find_handler
from lfmc.targets.shared.parameters_file import Parameter
from lfmc.targets.tvm.compile import CHECK, LENGTH
from lfmc.targets.tvm.kernels.attention import SLOTS
from lfmc.targets.tvm.kernels.builder import Columns
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.library import Library

Shape = tuple[Any, ...]
Handler = Callable[["Walk", fx.Node], Any]


@dataclass(frozen=True)
class Kind:
    """One of the library's functions."""

    name: str
    tokens: int | None
    last_only: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Value:
    """Some columns of a Relax value `[T, width]`, float32."""

    var: Any
    columns: Columns


def state_shape(spec: StateSpec) -> tuple[int, ...]:
    """Of a filter `[taps - 1, H]`, of keys `[K, C / 16, D, 16]`, of values `[K, C, D]`; `C` is
    the context, filled up to a multiple of 16."""
    if spec.kind == "conv":
        _, channels, back = spec.shape
        return back, channels
    _, heads, slots, dim = spec.shape
    blocks = -(-slots // SLOTS)
    if spec.kind == "key":
        return heads, blocks, dim, SLOTS
    return heads, blocks * SLOTS, dim


class Walk:
    """One function, operator by operator; `operators` are nodes of n-bit operators and the kernels
    that compute them, in order."""

    def __init__(self, library: Library, kind: Kind, handlers: Mapping[str, Handler]) -> None:
        self.handlers = handlers
        self.library, self.kind, self.kernels = library, kind, library.kernels
        self.program, self.constants = library.program, library.constants
        self.config = library.program.config
        self.length = kind.tokens or tirx.Var(LENGTH, "int64")
        self.operators: list[tuple[str, str]] = []
        self._params: dict[str, Any] = {}
        self._once: dict[Any, Any] = {}
        tokens, positions, *states = self.program.inputs
        self.tokens = _var("tokens", (self.length,), "int32")
        self.start = _var("start", (1,), "int32")
        specs = self.program.states
        self._given = [_var(s.identifier, state_shape(s), "float32") for s in specs]
        self.states: dict[fx.Node, Any] = dict(zip(states, self._given, strict=True))
        self.results: dict[fx.Node, Any] = {tokens: self.tokens, positions: None}
        builder = library.builder
        with builder.function(kind.name):
            with builder.dataflow():
                logits = builder.emit_output(self._run().var)
            params = [self._param(own) for own in library.parameters]
            builder.emit_func_output(logits, [self.tokens, self.start, *self._given, *params])

    def check(self) -> None:
        """A function that takes what this one does, and gives `start` back."""
        builder = self.library.builder
        params = [self._param(own) for own in self.library.parameters]
        with builder.function(CHECK):
            builder.emit_func_output(self.start, [self.tokens, self.start, *self._given, *params])

    def _run(self) -> Value:
        head: fx.Node = arguments(self.program.graph.output_node())[0][0]
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                if node is head and self.kind.last_only:
                    self._only_last(arguments(node)[0])
                self.results[node] = find_handler(self.handlers, node, "TVM")(self, node)
        logits: Value = self.results[head]
        return logits

    def _only_last(self, node: fx.Node) -> None:
        """Have a node stand for the last token's part of it; what comes is for one token."""
        hidden = self.whole(self.value(node))
        width = hidden.columns.size
        self.length = 1
        self.kind = Kind(self.kind.name, 1, exact=self.kind.exact)
        (last,) = self.call(self.kernels.last_of, width, given=[hidden.var], results=[(1, width)])
        self.results[node] = whole_value(last, width)

    def call(
        self,
        make: Callable[..., Any],
        *args: Any,
        given: Sequence[Any],
        results: Sequence[Shape],
        dtypes: Mapping[int, str] | None = None,
        states: Sequence[fx.Node] = (),
        node: fx.Node | None = None,
        **named: Any,
    ) -> list[Any]:
        """Call a kernel; `given` ends with `states`, which it writes in place. Returns the results,
        of float32 but for `dtypes`."""
        builder = self.library.builder
        kernel = self.library.kernel(make, *args, **named)
        if node is not None:
            self.operators.append((node.name, kernel.name_hint))
        held = [self.states[state] for state in states]
        whole = [*given, *held]
        types = [
            relax.TensorType(shape, (dtypes or {}).get(index, "float32"))
            for index, shape in enumerate(results)
        ]
        if held:
            first = len(given)
            written = [own.ty for own in held]
            places = [-1] * len(types) + [first + index for index in range(len(held))]
            call = relax.op.call_tir_inplace(kernel, whole, places, [*types, *written])
        else:
            call = relax.call_tir(kernel, whole, types if len(types) > 1 else types[0])
        made = builder.emit(call)
        count = len(types) + len(held)
        parts = [made] if count == 1 else [builder.emit(made[index]) for index in range(count)]
        for state, own in zip(states, parts[len(types) :], strict=True):
            self.states[state] = own
        return parts[: len(types)]

    def empty(self, rows: Any, size: int) -> Any:
        """Memory for a value that several kernels write."""
        (made,) = self.call(self.kernels.nothing, size, given=[], results=[(rows, size)])
        return made

    def write(
        self,
        make: Callable[..., Any],
        *args: Any,
        given: Sequence[Any],
        into: Any,
        node: fx.Node,
        **named: Any,
    ) -> Any:
        """Call a kernel that writes a part of a value, in place."""
        kernel = self.library.kernel(make, *args, **named)
        self.operators.append((node.name, kernel.name_hint))
        call = relax.op.call_tir_inplace(kernel, [*given, into], [len(given)], into.ty)
        return self.library.builder.emit(call)

    def one(self, make: Callable[..., Any], *args: Any, size: int, **named: Any) -> Value:
        """The result of a kernel that has one, `[T, size]`."""
        (made,) = self.call(make, *args, results=[(self.length, size)], **named)
        return whole_value(made, size)

    @property
    def product_tokens(self) -> int | None:
        """For which products are made: on a CPU one form will do for parity."""
        alike = self.kind.exact and isinstance(self.library.device, Cpu)
        return None if alike else self.kind.tokens

    def value(self, node: Any) -> Any:
        """What a node stands for: a value, several, or a constant's parameter."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            return self.floats(node)
        return self.results[node]

    def floats(self, node: fx.Node, *, taps: bool = False) -> Parameter:
        return self.constants.floats(self.sources(node), taps=taps)

    def sources(self, node: fx.Node) -> tuple[str, ...]:
        """The checkpoint's tensors behind a constant."""
        return self.program.weights[str(node.target)].sources

    def param(self, *parameters: Parameter) -> list[Any]:
        return [self._param(own) for own in parameters]

    def _param(self, own: Parameter) -> Any:
        if own.name not in self._params:
            self._params[own.name] = _var(f"p{len(self._params)}", own.shape, own.dtype)
        return self._params[own.name]

    def whole(self, value: Value) -> Value:
        """A value of its own, where it was columns of another."""
        columns = value.columns
        if columns.size == columns.width:
            return value
        tokens = self.kind.tokens
        return self.one(
            self.kernels.columns_of, columns, tokens, given=[value.var], size=columns.size
        )

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several operators share."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def activations(self, value: Value, group: int, rows: Any = None) -> list[Any]:
        """What a product with a matrix of such groups takes of `value`."""
        value = self.whole(value)
        if self.kind.exact:
            return [value.var]
        length = self.length if rows is None else rows
        size = value.columns.size
        tokens = length if isinstance(length, int) else None

        def make() -> list[Any]:
            shapes = [(length, size // 4), (length, size // group), (length, size // group)]
            types = {0: "int32", 2: "int32"}
            given = [value.var]
            return self.call(
                self.kernels.round_rows,
                size,
                group,
                tokens,
                given=given,
                results=shapes,
                dtypes=types,
            )

        return self.once((value.var, group), make)  # type: ignore[no-any-return]


def _var(name: str, shape: Shape, dtype: str) -> Any:
    return relax.Var(name, relax.TensorType(shape, dtype))


def whole_value(var: Any, size: int) -> Value:
    return Value(var, Columns(size, 0, size))
