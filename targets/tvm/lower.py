"""The fused program as Relax functions over lfmc's kernels: one Python function an operator.

Every function takes `tokens` int32 `[T]`, `start` int32 `[1]` (the position of the first), all
states and all parameters, and writes the states in place. `decode` is for one token, `prefill`
gives logits of the last of several, `score` of all. The same with `_exact` behind their names
leave activations float: for parity, and for apps that want it. `check` computes nothing; a host
calls it once, as the others do not look at the shapes of what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from torch import fx
from tvm import IRModule, relax, tirx

from lfmc.calib_free.formats import Format
from lfmc.errors import UnsupportedError
from lfmc.model import StateSpec
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.program import Program
from lfmc.targets.base import find_handler
from lfmc.targets.tvm.compile import CHECK, LENGTH
from lfmc.targets.tvm.constants import Constants
from lfmc.targets.tvm.cpus import Cpu
from lfmc.targets.tvm.gpus import Gpu
from lfmc.targets.tvm.kernels import moe
from lfmc.targets.tvm.kernels.attention import SLOTS, Heads
from lfmc.targets.tvm.kernels.builder import Columns
from lfmc.targets.tvm.kernels.sets import CPU, GPU
from lfmc.targets.tvm.parameters import Parameter
from lfmc.weights import PlannedWeights

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Kind:
    """One of the library's functions."""

    name: str
    tokens: int | None
    last_only: bool = False
    exact: bool = False


KINDS = (
    Kind("decode", 1),
    Kind("prefill", None, last_only=True),
    Kind("score", None),
    Kind("decode_exact", 1, exact=True),
    Kind("score_exact", None, exact=True),
)


@dataclass(frozen=True)
class Value:
    """Some columns of a Relax value `[T, width]`, float32."""

    var: Any
    columns: Columns


def state_name(spec: StateSpec) -> str:
    return f"{spec.kind}_{spec.layer}"


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


# Kernels for GPUs round no activations.
GPU_KINDS = tuple(replace(kind, exact=True) for kind in KINDS if not kind.exact)


class Lowering:
    """All functions, the kernels that they share, and the constants that they take."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, device: Cpu | Gpu
    ) -> None:
        self.program, self.context, self.device = program, context, device
        on_gpu = isinstance(device, Gpu)
        self.kinds, self.kernels = (GPU_KINDS, GPU) if on_gpu else (KINDS, CPU)
        self.constants = Constants(weights)
        self.builder = relax.BlockBuilder()
        self.operators: dict[str, list[tuple[str, str]]] = {}
        self._kernels: dict[Any, Any] = {}
        for kind in self.kinds:
            walk = Walk(self, kind)
            self.operators[kind.name] = walk.operators
        walk.check()

    @property
    def module(self) -> IRModule:
        return self.builder.get()

    @property
    def parameters(self) -> list[Parameter]:
        """In the order in which functions take them."""
        return list(self.constants.parameters.values())

    def kernel(self, make: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """A kernel, made once for the same numbers."""
        key = (make.__name__, args, tuple(sorted(named.items())))
        if key not in self._kernels:
            name = f"{make.__name__}_{len(self._kernels)}"
            self._kernels[key] = self.builder.add_func(make(*args, **named), name)
        return self._kernels[key]


class Walk:
    """One function, operator by operator; `operators` are nodes of n-bit operators and the kernels
    that compute them, in order."""

    def __init__(self, lowering: Lowering, kind: Kind) -> None:
        self.lowering, self.kind, self.kernels = lowering, kind, lowering.kernels
        self.program, self.constants = lowering.program, lowering.constants
        self.config = lowering.program.config
        self.length = 1 if kind.tokens == 1 else tirx.Var(LENGTH, "int64")
        self.operators: list[tuple[str, str]] = []
        self._params: dict[str, Any] = {}
        self._once: dict[Any, Any] = {}
        tokens, positions, *states = (n for n in self.program.graph.nodes if n.op == "placeholder")
        self.tokens = _var("tokens", (self.length,), "int32")
        self.start = _var("start", (1,), "int32")
        specs = self.program.states
        self._given = [_var(state_name(s), state_shape(s), "float32") for s in specs]
        self.states: dict[fx.Node, Any] = dict(zip(states, self._given, strict=True))
        self.results: dict[fx.Node, Any] = {tokens: self.tokens, positions: None}
        builder = lowering.builder
        with builder.function(kind.name):
            with builder.dataflow():
                logits = builder.emit_output(self._run().var)
            params = [self._param(own) for own in lowering.parameters]
            builder.emit_func_output(logits, [self.tokens, self.start, *self._given, *params])

    def check(self) -> None:
        """A function that takes what this one does, and gives `start` back."""
        builder = self.lowering.builder
        params = [self._param(own) for own in self.lowering.parameters]
        with builder.function(CHECK):
            builder.emit_func_output(self.start, [self.tokens, self.start, *self._given, *params])

    def _run(self) -> Value:
        head: fx.Node = arguments(self.program.graph.output_node())[0][0]
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                if node is head and self.kind.last_only:
                    self._only_last(arguments(node)[0])
                self.results[node] = find_handler(HANDLERS, node, "TVM")(self, node)
        logits: Value = self.results[head]
        return logits

    def _only_last(self, node: fx.Node) -> None:
        """Have a node stand for the last token's part of it; what comes is for one token."""
        hidden = self.whole(self.value(node))
        width = hidden.columns.size
        self.length = 1
        self.kind = Kind(self.kind.name, 1, exact=self.kind.exact)
        (last,) = self.call(self.kernels.last_of, width, given=[hidden.var], results=[(1, width)])
        self.results[node] = _whole(last, width)

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
        builder = self.lowering.builder
        kernel = self.lowering.kernel(make, *args, **named)
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
        kernel = self.lowering.kernel(make, *args, **named)
        self.operators.append((node.name, kernel.name_hint))
        call = relax.op.call_tir_inplace(kernel, [*given, into], [len(given)], into.ty)
        return self.lowering.builder.emit(call)

    def one(self, make: Callable[..., Any], *args: Any, size: int, **named: Any) -> Value:
        """The result of a kernel that has one, `[T, size]`."""
        (made,) = self.call(make, *args, results=[(self.length, size)], **named)
        return _whole(made, size)

    @property
    def product_tokens(self) -> int | None:
        """For which products are made: on a CPU one form will do for parity."""
        alike = self.kind.exact and isinstance(self.lowering.device, Cpu)
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


def _whole(var: Any, size: int) -> Value:
    return Value(var, Columns(size, 0, size))


def _columns(node: fx.Node) -> int:
    """Of a node's value, all but its dims of batch and time."""
    shape = node.meta["val"].shape
    return prod(int(size) for size in shape[1:] if isinstance(size, int))


Handler = Callable[[Walk, fx.Node], Any]


def _embedding(m: Walk, node: fx.Node) -> Value:
    table, ids = arguments(node)[:2]
    own = m.floats(table)
    rows, size = own.shape
    given = [m.value(ids), *m.param(own)]
    return m.one(m.kernels.embedding, rows, size, own.dtype, m.kind.tokens, given=given, size=size)


def _embedding_nbits(m: Walk, node: fx.Node) -> Value:
    ids, codes, *_ = arguments(node)
    matrix, parts = m.constants.matrix(m.sources(codes))
    return m.one(
        m.kernels.embedding_nbits,
        matrix,
        m.kind.tokens,
        given=[m.value(ids), *m.param(*parts)],
        size=matrix.columns,
    )


def _linear(m: Walk, node: fx.Node) -> Value:
    x, weight, bias = (m.value(arg) for arg in arguments(node))
    rows, columns = weight.shape
    given = [m.whole(x).var, *m.param(weight, *([bias] if bias else []))]
    return m.one(
        m.kernels.float_linear,
        rows,
        columns,
        weight.dtype,
        m.kind.tokens,
        given=given,
        size=rows,
        bias=bias.dtype if bias else None,
    )


def _linear_nbits(m: Walk, node: fx.Node) -> Value:
    x, codes, _, _, bias, *_ = arguments(node)
    matrix, parts = m.constants.matrix(m.sources(codes))
    own_bias = [m.floats(bias)] if bias is not None else []
    given = [*m.activations(m.value(x), matrix.format.group), *m.param(*parts, *own_bias)]
    return m.one(
        m.kernels.linear,
        matrix.format,
        matrix.tail,
        m.lowering.device,
        m.product_tokens,
        given=given,
        size=matrix.rows,
        node=node,
        bias=own_bias[0].dtype if own_bias else None,
        exact=m.kind.exact,
    )


def _rms_norm(m: Walk, node: fx.Node) -> Value:
    x, weight, eps = (m.value(arg) for arg in arguments(node))
    (size,) = weight.shape
    given = [m.whole(x).var, *m.param(weight)]
    args = (size, weight.dtype, eps, m.kind.tokens)
    return m.one(m.kernels.rms_norm, *args, given=given, size=size)


def _add_rms_norm(m: Walk, node: fx.Node) -> Sequence[Value]:
    x, residual, weight, eps = (m.value(arg) for arg in arguments(node))
    (size,) = weight.shape
    given = [m.whole(x).var, m.whole(residual).var, *m.param(weight)]
    args = (size, weight.dtype, eps, m.kind.tokens)
    shapes = [(m.length, size)] * 2
    made = m.call(m.kernels.add_rms_norm, *args, given=given, results=shapes)
    return [_whole(var, size) for var in made]


def _gated_short_conv(m: Walk, node: fx.Node) -> Sequence[Any]:
    bcx, weight, bias, state = arguments(node)
    taps, own_bias = m.floats(weight, taps=True), [m.floats(bias)] if bias is not None else []
    count, size = taps.shape
    y = m.one(
        m.kernels.gated_short_conv,
        size,
        count,
        taps.dtype,
        m.kind.tokens,
        given=[m.whole(m.value(bcx)).var, *m.param(taps, *own_bias)],
        states=[state],
        size=size,
        bias=own_bias[0].dtype if own_bias else None,
    )
    return y, None


def _attention(m: Walk, node: fx.Node) -> Sequence[Any]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = arguments(node)
    config, tokens = m.config, m.kind.tokens
    slots = -(-m.lowering.context // SLOTS) * SLOTS
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, slots)
    parts = [m.value(x) for x in (q, k, v)]
    norms = [m.floats(x) for x in (q_norm, k_norm)]
    kind = str(inv_freq.target).removeprefix("rope.")
    cos, sin = m.once(("angles", kind), lambda: _angles(m, kind))
    size = heads.queries * heads.dim
    turned = m.one(
        m.kernels.write_heads,
        heads,
        tuple(part.columns for part in parts),
        tuple(norm.dtype for norm in norms),
        eps,
        tokens,
        given=[*(part.var for part in parts), m.start, *m.param(*norms), cos, sin],
        states=[keys, values],
        size=size,
    )
    given = [turned.var, m.start, m.states[keys], m.states[values]]
    y = m.one(m.kernels.attend, heads, window, tokens, given=given, size=size)
    return y, None, None


def _angles(m: Walk, kind: str) -> list[Any]:
    name, dim = f"rope.{kind}", m.config.head_dim
    steps = m.constants.of_config(name, lambda: inverse_frequencies(m.config, kind).float())
    return m.call(
        m.kernels.angles,
        dim,
        m.kind.tokens,
        given=[m.start, *m.param(steps)],
        results=[(m.length, dim)] * 2,
    )


def _swiglu(m: Walk, node: fx.Node) -> Value:
    gate, up = (m.value(x) for x in node.args)
    given, size = [gate.var, up.var], gate.columns.size
    return m.one(m.kernels.swiglu, gate.columns, up.columns, m.kind.tokens, given=given, size=size)


def _moe(m: Walk, node: fx.Node) -> Value:
    x, scores, choice, w1, w3, w2, top_k, normalize, scale = arguments(node)
    experts = [tuple(map(m.program.tensor_behind, own)) for own in zip(w1, w3, w2, strict=True)]
    tokens, count = m.kind.tokens, len(experts)
    given = [m.whole(m.value(arg)).var for arg in (scores, choice)]
    few, places = (m.length, top_k), m.length * top_k
    chosen, shares = m.call(
        m.kernels.route,
        count,
        top_k,
        normalize,
        scale,
        tokens,
        given=given,
        results=[few, few],
        dtypes={0: "int32"},
    )
    order, begins = m.call(
        m.kernels.group,
        count,
        top_k,
        tokens,
        given=[chosen],
        results=[(places,), (count + 1,)],
        dtypes={0: "int32", 1: "int32"},
    )
    kinds = _kinds(m, experts)
    inner = _experts(m, node, m.kernels.gate_up, m.value(x), kinds, 2, (order, begins), top_k)
    found = _experts(m, node, m.kernels.down, inner, kinds, 1, (order, begins), top_k)
    size = found.columns.size
    return m.one(m.kernels.combine, size, top_k, tokens, given=[shares, found.var], size=size)


# Experts whose matrices have the same formats: where each expert of the layer is among them, and
# names of their w1, w3 and w2.
Experts = tuple[list[int], tuple[tuple[str, ...], ...]]


def _kinds(m: Walk, experts: Sequence[tuple[str, ...]]) -> list[Experts]:
    formats = [tuple(map(m.constants.weights.format, names)) for names in experts]
    kinds: list[Experts] = []
    for kind in dict.fromkeys(formats):
        own = [index for index, other in enumerate(formats) if other == kind]
        members = [own.index(index) if index in own else -1 for index in range(len(experts))]
        kinds.append((members, tuple(zip(*(experts[index] for index in own), strict=True))))
    return kinds


def _experts(
    m: Walk,
    node: fx.Node,
    make: Callable[..., Any],
    value: Value,
    kinds: Sequence[Experts],
    matrices: int,
    order: tuple[Any, Any],
    top_k: int,
) -> Value:
    """`gate_up` of w1 and w3, or `down` of w2, for all kinds of experts into one value."""
    places = m.length * top_k
    size = m.constants.weights.checkpoint.tensors[kinds[0][1][0 if matrices == 2 else 2][0]].shape[
        0
    ]
    exact, made = m.kind.exact, m.empty(places, size)
    for members, names in kinds:
        own = names[:2] if matrices == 2 else names[2:]
        stacks, parts = zip(*(m.constants.stack(each) for each in own), strict=True)
        _require_alike(stacks, own[0][0])
        rounded = isinstance(stacks[0], Format)
        rows = places if matrices == 1 else m.length
        given = m.activations(value, stacks[0].group, rows) if rounded else [m.whole(value).var]
        table = relax.const(np.array(members, np.int32))
        args = (*stacks, top_k) if matrices == 2 else stacks
        named = {} if matrices == 2 else {"top_k": top_k}
        made = m.write(
            make,
            *args,
            m.lowering.device,
            m.product_tokens,
            given=[*given, *order, table, *m.param(*(p for each in parts for p in each))],
            into=made,
            node=node,
            exact=exact,
            **named,
        )
    return _whole(made, size)


def _require_alike(stacks: Sequence[moe.Stack], name: str) -> None:
    """An expert's w1 and w3 are given the same activations."""
    groups = {stack.group if isinstance(stack, Format) else 0 for stack in stacks}
    if len(groups) > 1:
        raise UnsupportedError(
            "an expert's w1 and w3 have groups of different sizes, or only one of them has any",
            where=name,
            todo="give both the same group; widths may differ",
        )


def _same(m: Walk, node: fx.Node) -> Any:
    """Another view of the same numbers."""
    return m.value(arguments(node)[0])


def _split(m: Walk, node: fx.Node) -> Sequence[Value]:
    x, sizes, _ = arguments(node)  # of the last dim
    value = m.whole(m.value(x))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        Value(value.var, Columns(value.columns.width, start, size))
        for start, size in zip(starts, sizes, strict=True)
    ]


def _getitem(m: Walk, node: fx.Node) -> Any:
    source, index = node.args
    return m.value(source)[index]


def _binary(kind: str) -> Handler:
    def lower(m: Walk, node: fx.Node) -> Value:
        first, second = (m.value(x) for x in node.args[:2])
        if isinstance(first, Parameter) or (
            isinstance(second, Value) and second.columns.size > first.columns.size
        ):
            first, second = second, first
        first = m.whole(first)
        size = first.columns.size
        if isinstance(second, Parameter):
            other, given, constant = second.shape[0], m.param(second)[0], second.dtype
        else:
            second = m.whole(second)
            other, given, constant = second.columns.size, second.var, None
        return m.one(
            m.kernels.binary,
            kind,
            size,
            other,
            m.kind.tokens,
            given=[first.var, given],
            size=size,
            constant=constant,
        )

    return lower


def _sigmoid(m: Walk, node: fx.Node) -> Value:
    x = m.whole(m.value(node.args[0]))
    size = x.columns.size
    return m.one(m.kernels.sigmoids, size, m.kind.tokens, given=[x.var], size=size)


def _nothing(m: Walk, node: fx.Node) -> None:
    """Read by the operator that uses it (an expert's codes, a symbolic size)."""


HANDLERS: dict[str, Handler] = {
    "aten.add": _binary("add"),
    "aten.embedding": _embedding,
    "aten.flatten": _same,
    "aten.linear": _linear,
    "aten.mul": _binary("mul"),
    "aten.sigmoid": _sigmoid,
    "aten.split_with_sizes": _split,
    "aten.unsqueeze": _same,
    "aten.view_as": _same,
    "getitem": _getitem,
    "lfm.add_rms_norm": _add_rms_norm,
    "lfm.attention": _attention,
    "lfm.dequantize": _nothing,
    "lfm.embedding_nbits": _embedding_nbits,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear_nbits,
    "lfm.moe": _moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
