"""Build one Relax function over kernels, operator by operator."""

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
Handler = Callable[["FunctionBuilder", fx.Node], Any]


@dataclass(frozen=True)
class FunctionSpec:
    """One of the functions of the library; `tokens` is None if a call may have several tokens."""

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
    """Return the shape of a filter state `[taps - 1, H]`, of keys `[K, C / 16, D, 16]`, or of
    values `[K, C, D]`; `C` is the context, rounded up to a multiple of 16."""
    if spec.kind == "conv":
        _, channels, back = spec.shape
        return back, channels
    _, heads, slots, dim = spec.shape
    blocks = -(-slots // SLOTS)
    if spec.kind == "key":
        return heads, blocks, dim, SLOTS
    return heads, blocks * SLOTS, dim


class FunctionBuilder:
    """Builds one function, operator by operator.

    `operators` lists the nodes of n-bit operators and the kernels that compute them, in order.
    """

    def __init__(
        self, library: Library, spec: FunctionSpec, handlers: Mapping[str, Handler]
    ) -> None:
        self.handlers = handlers
        self.library, self.spec, self.kernels = library, spec, library.kernels
        self.program, self.constants = library.program, library.constants
        self.config = library.program.config
        self.length = spec.tokens or tirx.Var(LENGTH, "int64")
        self.operators: list[tuple[str, str]] = []
        self._parameter_vars: dict[str, Any] = {}
        self._cache: dict[Any, Any] = {}
        tokens, positions, *states = self.program.inputs
        self.tokens = _var("tokens", (self.length,), "int32")
        self.start = _var("start", (1,), "int32")
        self._state_vars = [
            _var(state.identifier, state_shape(state), "float32") for state in self.program.states
        ]
        self.states: dict[fx.Node, Any] = dict(zip(states, self._state_vars, strict=True))
        self.node_values: dict[fx.Node, Any] = {tokens: self.tokens, positions: None}
        builder = library.builder
        with builder.function(spec.name):
            with builder.dataflow():
                logits = builder.emit_output(self._build_logits().var)
            builder.emit_func_output(logits, self._inputs())

    def add_check(self) -> None:
        """Add the function `check`, which takes the inputs of this function and returns `start`."""
        builder, inputs = self.library.builder, self._inputs()
        with builder.function(CHECK):
            builder.emit_func_output(self.start, inputs)

    def _inputs(self) -> list[Any]:
        """Return the inputs of the function, in order."""
        parameters = self.parameter_vars(*self.library.parameters)
        return [self.tokens, self.start, *self._state_vars, *parameters]

    def _build_logits(self) -> Value:
        head: fx.Node = arguments(self.program.graph.output_node())[0][0]
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                if node is head and self.spec.last_only:
                    self._keep_last_token(arguments(node)[0])
                self.node_values[node] = find_handler(self.handlers, node, "TVM")(self, node)
        logits: Value = self.node_values[head]
        return logits

    def _keep_last_token(self, node: fx.Node) -> None:
        """Replace the value of a node with its last token; later operators have one token."""
        hidden = self.materialize(self.node_value(node))
        width = hidden.columns.size
        self.length = 1
        self.spec = FunctionSpec(self.spec.name, 1, exact=self.spec.exact)
        (last,) = self.call(
            self.kernels.last_of, width, inputs=[hidden.var], result_shapes=[(1, width)]
        )
        self.node_values[node] = full_value(last, width)

    def call(
        self,
        kernel_builder: Callable[..., Any],
        *args: Any,
        inputs: Sequence[Any],
        result_shapes: Sequence[Shape],
        dtypes: Mapping[int, str] | None = None,
        states: Sequence[fx.Node] = (),
        node: fx.Node | None = None,
        **options: Any,
    ) -> list[Any]:
        """Call a kernel with `inputs`, then `states`, which the kernel writes in place.

        Returns the results, which are float32 unless `dtypes` has another dtype for their index.
        """
        builder = self.library.builder
        kernel = self.library.kernel(kernel_builder, *args, **options)
        if node is not None:
            self.operators.append((node.name, kernel.name_hint))
        state_values = [self.states[state] for state in states]
        operands = [*inputs, *state_values]
        types = [
            relax.TensorType(shape, (dtypes or {}).get(index, "float32"))
            for index, shape in enumerate(result_shapes)
        ]
        if state_values:
            state_types = [value.ty for value in state_values]
            indices = [-1] * len(types) + list(range(len(inputs), len(operands)))
            call = relax.op.call_tir_inplace(kernel, operands, indices, [*types, *state_types])
        else:
            call = relax.call_tir(kernel, operands, types if len(types) > 1 else types[0])
        output = builder.emit(call)
        count = len(types) + len(state_values)
        outputs = [output] if count == 1 else [builder.emit(output[i]) for i in range(count)]
        for state, value in zip(states, outputs[len(types) :], strict=True):
            self.states[state] = value
        return outputs[: len(types)]

    def allocate(self, rows: Any, size: int) -> Any:
        """Allocate memory for a value that several kernels write."""
        (value,) = self.call(self.kernels.nothing, size, inputs=[], result_shapes=[(rows, size)])
        return value

    def call_in_place(
        self,
        kernel_builder: Callable[..., Any],
        *args: Any,
        inputs: Sequence[Any],
        output: Any,
        node: fx.Node,
        **options: Any,
    ) -> Any:
        """Call a kernel that writes a part of `output` in place."""
        kernel = self.library.kernel(kernel_builder, *args, **options)
        self.operators.append((node.name, kernel.name_hint))
        call = relax.op.call_tir_inplace(kernel, [*inputs, output], [len(inputs)], output.ty)
        return self.library.builder.emit(call)

    def call_single(
        self, kernel_builder: Callable[..., Any], *args: Any, size: int, **options: Any
    ) -> Value:
        """Call a kernel with one result `[T, size]`, and return the result."""
        shapes = [(self.length, size)]
        (var,) = self.call(kernel_builder, *args, result_shapes=shapes, **options)
        return full_value(var, size)

    @property
    def product_tokens(self) -> int | None:
        """The tokens that product kernels are built for: on a CPU, the parity functions share one
        kernel for any number of tokens."""
        shared = self.spec.exact and isinstance(self.library.device, Cpu)
        return None if shared else self.spec.tokens

    def node_value(self, node: Any) -> Any:
        """Return the value or values of a node, or the parameter of a constant."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            return self.floats(node)
        return self.node_values[node]

    def floats(self, node: fx.Node, *, taps: bool = False) -> Parameter:
        """Return the parameter of a float constant."""
        return self.constants.floats(self.sources(node), taps=taps)

    def sources(self, node: fx.Node) -> tuple[str, ...]:
        """Return the names of the checkpoint's tensors in a constant."""
        return self.program.weights[str(node.target)].sources

    def parameter_vars(self, *parameters: Parameter) -> list[Any]:
        """Return the Relax variables of parameters."""
        return [self._parameter_var(parameter) for parameter in parameters]

    def _parameter_var(self, parameter: Parameter) -> Any:
        variables, name = self._parameter_vars, parameter.name
        if name not in variables:
            variables[name] = _var(f"p{len(variables)}", parameter.shape, parameter.dtype)
        return variables[name]

    def materialize(self, value: Value) -> Value:
        """Copy a value that is columns of another value; return any other value unchanged."""
        columns, tokens = value.columns, self.spec.tokens
        if columns.size == columns.width:
            return value
        return self.call_single(
            self.kernels.columns_of, columns, tokens, inputs=[value.var], size=columns.size
        )

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return a value that several operators share; compute the value at the first use."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def activations(self, value: Value, group: int, rows: Any = None) -> list[Any]:
        """Return the activations of a product with a matrix of groups of size `group`."""
        value = self.materialize(value)
        if self.spec.exact:
            return [value.var]
        length = self.length if rows is None else rows
        size = value.columns.size
        tokens = length if isinstance(length, int) else None

        def compute() -> list[Any]:
            return self.call(
                self.kernels.round_rows,
                size,
                group,
                tokens,
                inputs=[value.var],
                result_shapes=[
                    (length, size // 4),
                    (length, size // group),
                    (length, size // group),
                ],
                dtypes={0: "int32", 2: "int32"},
            )

        return self.cached((value.var, group), compute)  # type: ignore[no-any-return]


def _var(name: str, shape: Shape, dtype: str) -> Any:
    return relax.Var(name, relax.TensorType(shape, dtype))


def full_value(var: Any, size: int) -> Value:
    """Return a value of all columns of a Relax value."""
    return Value(var, Columns(size, 0, size))
