"""The fused program as steps of ExecuTorch: one Python function an operator, in a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.calib_free.pack import PackedTensor
from lfmc.errors import UnsupportedError
from lfmc.model import StateSpec
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.program import Program
from lfmc.targets.base import StoredTensor, find_handler
from lfmc.targets.executorch.assemble import Assembled, assemble
from lfmc.targets.executorch.recorder import Recorder, number, numel_at_one
from lfmc.targets.executorch.steps import (
    Block,
    Constant,
    Element,
    Given,
    Host,
    Length,
    Matrix,
    Number,
    Only,
    State,
    Step,
    Value,
    arrange,
    constant,
    most,
)
from lfmc.targets.executorch.stored import matrix_parts, stored
from lfmc.weights import PlannedWeights

# Far more than scores of attention differ by, and far less than float32's largest number.
FAR = 1e9
FLOAT = 6  # float32, as operators of ExecuTorch are told


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
        *,
        last_only: bool = False,
    ) -> None:
        self.program, self.weights, self.context = program, weights, context
        self.length = Length(chunk)
        self.recorder = Recorder()
        self.stored: list[StoredTensor] = []
        self._constants: dict[Any, Any] = {}
        self._once: dict[Any, Any] = {}
        tokens, positions, *states = (n for n in program.graph.nodes if n.op == "placeholder")
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
                self.results[node] = find_handler(HANDLERS, node, "ExecuTorch")(self, node)
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


def state_name(spec: StateSpec) -> str:
    return f"{spec.kind}_{spec.layer}"


def state_shape(spec: StateSpec) -> tuple[int, ...]:
    """Of a filter `[1, taps - 1, H]`, of keys and values `[1, C, K, D]`."""
    batch, channels, *rest = spec.shape
    return (batch, rest[0], channels, *rest[1:])


def _as_is(value: Tensor) -> Tensor:
    return value


def _taps(value: Tensor) -> Tensor:
    return value[:, 0].T


ARRANGED: Mapping[str, Callable[[Tensor], Tensor]] = {"float32": _as_is, "taps": _taps}

Handler = Callable[[Lowering, fx.Node], Any]


def _embedding(m: Lowering, node: fx.Node) -> Value:
    table, ids = arguments(node)[:2]
    held = m.floats(table, copy=int(m.program.config.tied_embedding))
    args = (held, m.value(ids), -1, False, False)
    return m.host("aten::embedding.out", args, (1, m.length, held.shape[1]))


def _embedding_nbits(m: Lowering, node: fx.Node) -> Value:
    ids, codes, *_ = arguments(node)
    name, sources = str(codes.target).removesuffix(".codes"), m.sources(codes)
    packed = m.weights.packed(sources)
    copy = int(m.program.config.tied_embedding)
    code_kind, scale_kind, operator = LOOKUPS[packed.format.bits]
    low = -(1 << packed.format.bits - 1)

    def table() -> Any:
        value = lookup_codes(packed)
        return constant(value), [stored(code_kind, value, "codes", sources, copy)]

    def scales() -> Any:
        value = lookup_scales(packed)
        return constant(value), [stored(scale_kind, value, "scales", sources, copy)]

    held, steps = m.constant((name, "lookup"), table), m.constant((name, "lookup steps"), scales)
    args = (held, steps, None, low, -low - 1, m.value(ids), FLOAT)
    return m.host(operator, args, (1, m.length, packed.shape[1]))


def lookup_codes(packed: PackedTensor) -> Tensor:
    """Codes as the embedding operators read them: signed int8 `[V, H]`, or two of 4 bits in a byte,
    the first in its higher half."""
    if packed.format.bits == 8:
        return packed.signed_codes()
    return (packed.codes[:, 0::2] << 4) | packed.codes[:, 1::2]


def lookup_scales(packed: PackedTensor) -> Tensor:
    """Scales of a lookup: float32 `[V]` for whole rows, else float16 `[V, G]`.

    Raises `UnsupportedError` where a bfloat16 scale is no float16.
    """
    if packed.format.bits == 8:
        return packed.scales.squeeze(1)
    narrow = packed.scales.to(torch.float16)
    if not torch.equal(narrow.to(torch.bfloat16), packed.scales):
        raise UnsupportedError(
            "a scale of the embedding is too small or too large for the runtime's lookup",
            expected="numbers that float16 has",
            got=f"{float(packed.scales.abs().min()):g} to {float(packed.scales.abs().max()):g}",
            todo="plan 8 bits for the embedding",
        )
    return narrow


# By bits: how codes and scales are stored, and the operator.
LOOKUPS = {
    4: ("swapped", "float16", "quantized_decomposed::embedding_4bit.dtype_out"),
    8: ("signed", "row_scales", "quantized_decomposed::embedding_byte.dtype_out"),
}


def _linear(m: Lowering, node: fx.Node) -> Value:
    x, weight, bias = (m.value(arg) for arg in arguments(node))
    return m.recorder.linear(x, weight, bias)


def _linear_nbits(m: Lowering, node: fx.Node) -> Value:
    x, codes, _, _, bias, *_ = arguments(node)
    return m.recorder.linear(m.value(x), _matrix(m, codes), m.value(bias))


def _matrix(m: Lowering, codes: fx.Node) -> Matrix:
    """The n-bit weight behind a codes node."""
    sources = m.sources(codes)

    def make() -> Any:
        packed = m.weights.packed(sources)
        bits, span = packed.format.bits, packed.format.span(packed.shape[1])
        held = packed.packed_codes() if bits == 4 else packed.signed_codes()
        matrix = Matrix(packed.shape, bits, span, held, packed.scales)
        return matrix, matrix_parts(packed, sources)

    return m.constant((codes.target, "matrix"), make)  # type: ignore[no-any-return]


def _rms_norm(m: Lowering, node: fx.Node) -> Value:
    x, weight, eps = arguments(node)
    return m.recorder.norm(m.value(x), m.value(weight), eps)


def _add_rms_norm(m: Lowering, node: fx.Node) -> Sequence[Value]:
    x, residual, weight, eps = arguments(node)
    total = m.recorder.add(m.value(residual), m.value(x))
    return m.recorder.norm(total, m.value(weight), eps), total


def _gated_short_conv(m: Lowering, node: fx.Node) -> Sequence[Any]:
    bcx, weight, bias, state = arguments(node)
    inner, held, taps = m.recorder, m.states[state], m.floats(weight, "taps")
    given = m.value(bcx)
    size, back = most(given.shape)[-1] // 3, most(held.shape)[1]
    gate, out_gate, x = (inner.cut(given, part * size, size) for part in range(3))
    shape = (1, Length(m.length.most + back), size)
    seen = inner.join(inner.multiply(held, m.begun()), inner.multiply(gate, x), 1, shape)
    kept = m.once("kept until", lambda: _kept_until(m, back))
    # What the next call needs is the last of these; it is written where this call found it.
    args = (seen, 1, m.count, kept, 1, held)
    inner.steps.append(
        Host("aten::slice_copy.Tensor_out", args, (held,), (held,), work=back * size)
    )
    mixed = inner.filter(seen, taps, m.value(bias), m.length)
    return inner.multiply(out_gate, mixed), None


def _kept_until(m: Lowering, back: int) -> Number:
    until = Number()
    m.number("executorch_prim::add.Scalar", (m.count, back), until)
    return until


def _attention(m: Lowering, node: fx.Node) -> Sequence[Any]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = arguments(node)
    config, inner = m.program.config, m.recorder
    dim = config.head_dim
    cos, sin = m.turns(str(inv_freq.target).removeprefix("rope."))

    def heads(x: fx.Node, count: int) -> Value:
        return inner.reshape(m.value(x), (1, m.length, count, dim))

    def turned(x: fx.Node, norm: fx.Node, count: int) -> Value:
        whole = inner.norm(heads(x, count), m.value(norm), eps)
        first, second = (inner.cut(whole, at, dim // 2) for at in (0, dim // 2))
        left = inner.subtract(inner.multiply(first, cos), inner.multiply(second, sin))
        right = inner.add(inner.multiply(second, cos), inner.multiply(first, sin))
        return inner.join(left, right, 3, whole.shape)

    query = turned(q, q_norm, config.num_heads)
    written = []
    for new, state in (
        (turned(k, k_norm, config.num_kv_heads), keys),
        (heads(v, config.num_kv_heads), values),
    ):
        done = Value((1,))
        put = (new, m.states[state], m.start, done)
        inner.steps.append(Host("llama::update_cache.out", put, (done,), (done,)))
        written.append(done)
    mask = m.window(window) if window else None
    y = Value(query.shape)
    held = (m.states[keys], m.states[values])
    args = (query, *held, m.start, mask, 0.0, mask is None, dim**-0.5, y)
    work = 2 * numel_at_one(query.shape)
    inner.steps.append(
        Host("llama::custom_sdpa.out", args, (y,), (y,), needs=tuple(written), work=work)
    )
    return y, None, None


def _swiglu(m: Lowering, node: fx.Node) -> Value:
    gate, up = (m.value(x) for x in node.args)
    return m.recorder.multiply(m.recorder.silu(gate), up)


def _moe(m: Lowering, node: fx.Node) -> Value:
    """Each expert on the tokens that chose it; those that none chose are passed over."""
    x, scores, choice, w1, w3, w2, *choosing = arguments(node)
    inputs = tuple(m.value(arg) for arg in (x, scores, choice))
    given = inputs[0]
    with m.apart() as steps:
        shares = _shares(m, *inputs[1:], *choosing)
        experts = shares.shape[1]
        highest = m.host("aten::amax.out", (shares, [0], False), (experts,))
        used = m.host("aten::gt.Scalar_out", (highest, 0.0), (experts,), torch.bool)
        mixed = m.host("aten::full_like.out", (given, 0.0, None), given.shape)
        for index, matrices in enumerate(zip(w1, w3, w2, strict=True)):
            with m.apart() as own:
                _expert(m, given, shares, index, matrices, mixed)
            steps.append(Only(Element((), torch.bool, of=used, index=index), own))
    m.recorder.steps.append(Block(inputs, (mixed,), steps))
    return mixed


def _shares(
    m: Lowering, scores: Value, choice: Value, top_k: int, normalize: bool, scale: float
) -> Value:
    """What each expert counts for, `[N, E]`: 0 where it was not chosen."""
    tokens = scores.shape[0]
    few = (tokens, top_k)
    best, chosen = Value(few), Value(few, torch.int64)
    args = (choice, top_k, -1, True, True, best, chosen)
    m.recorder.steps.append(Host("aten::topk.values", args, ([best, chosen],), (best, chosen)))
    weights = m.host("aten::gather.out", (scores, 1, chosen, False), few)
    if normalize:
        total = m.host("aten::sum.IntList_out", (weights, [-1], True, None), (tokens, 1))
        total = m.host("aten::add.Scalar_out", (total, 1e-6, 1), (tokens, 1))
        weights = m.host("aten::div.out", (weights, total), few)
    if scale != 1:
        weights = m.host("aten::mul.Scalar_out", (weights, scale), few)
    none = m.host("aten::full_like.out", (scores, 0.0, None), scores.shape)
    return m.host("aten::scatter.src_out", (none, 1, chosen, weights), scores.shape)


def _expert(
    m: Lowering, x: Value, shares: Value, index: int, matrices: Sequence[fx.Node], mixed: Value
) -> None:
    """Add an expert's part of the tokens that chose it to `mixed`."""
    tokens, size = x.shape
    share = m.host("aten::select_copy.int_out", (shares, 1, index), (tokens,))
    found = m.host("aten::nonzero.out", (share,), (tokens, 1), torch.int64)
    rows = m.host("aten::squeeze_copy.dim_out", (found, 1), (tokens,), torch.int64)
    given = m.host("aten::index_select.out", (x, 0, rows), (tokens, size))
    weight = m.host("aten::index_select.out", (share, 0, rows), (tokens,))
    inner = m.recorder
    w1, w3, w2 = (_expert_matrix(m, matrix) for matrix in matrices)
    y = inner.multiply(inner.silu(inner.linear(given, w1)), inner.linear(given, w3))
    y = inner.multiply(inner.linear(y, w2), inner.reshape(weight, (tokens, 1)))
    before = m.host("aten::index_select.out", (mixed, 0, rows), (tokens, size))
    args = (mixed, (rows,), inner.add(before, y), False)
    inner.steps.append(Host("aten::index_put_", args, (mixed,), (mixed,)))


def _expert_matrix(m: Lowering, weight: fx.Node) -> Matrix | Value:
    """An expert's matrix: n-bit codes that a call would dequantize, or floats."""
    if weight.op == "call_function":
        return _matrix(m, arguments(weight)[0])
    return m.value(weight)  # type: ignore[no-any-return]


def _flatten(m: Lowering, node: fx.Node) -> Value:
    x, start, end = arguments(node)
    given = m.value(x)
    last = end % len(given.shape)
    sizes = given.shape[start : last + 1]
    whole: Any = 1
    for size in sizes:
        whole = size if whole == 1 else whole if size == 1 else whole * size
    return m.recorder.reshape(given, (*given.shape[:start], whole, *given.shape[last + 1 :]))


def _view_as(m: Lowering, node: fx.Node) -> Value:
    x, like = (m.value(arg) for arg in node.args)
    return m.recorder.reshape(x, like.shape)


def _split(m: Lowering, node: fx.Node) -> Sequence[Value]:
    x, sizes, _ = arguments(node)  # of the last dim
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [m.recorder.cut(m.value(x), *cut) for cut in zip(starts, sizes, strict=True)]


def _getitem(m: Lowering, node: fx.Node) -> Any:
    source, index = node.args
    return m.value(source)[index]


def _unsqueeze(m: Lowering, node: fx.Node) -> Value:
    x, dim = arguments(node)
    given = m.value(x)
    shape = list(given.shape)
    shape.insert(dim % (len(shape) + 1), 1)
    return m.recorder.reshape(given, tuple(shape))


def _pair(m: Lowering, node: fx.Node) -> list[Value]:
    found = (m.value(x) for x in node.args)
    return [x if isinstance(x, Value) else number(float(x)) for x in found]


def _add(m: Lowering, node: fx.Node) -> Value:
    return m.recorder.add(*_pair(m, node))


def _mul(m: Lowering, node: fx.Node) -> Value:
    return m.recorder.multiply(*_pair(m, node))


def _sigmoid(m: Lowering, node: fx.Node) -> Value:
    return m.recorder.sigmoid(m.value(node.args[0]))


def _nothing(m: Lowering, node: fx.Node) -> None:
    """Read by the operator that uses it (an expert's codes, a symbolic size)."""


HANDLERS: dict[str, Handler] = {
    "aten.add": _add,
    "aten.embedding": _embedding,
    "aten.flatten": _flatten,
    "aten.linear": _linear,
    "aten.mul": _mul,
    "aten.sigmoid": _sigmoid,
    "aten.split_with_sizes": _split,
    "aten.unsqueeze": _unsqueeze,
    "aten.view_as": _view_as,
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
