"""The operators of a fused program in Relax: one Python function each, in a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.targets.shared.parameters_file import Parameter
from lfmc.targets.tvm.experts import lower_moe
from lfmc.targets.tvm.kernels.attention import SLOTS, Heads
from lfmc.targets.tvm.kernels.builder import Columns
from lfmc.targets.tvm.relax_function import Handler, Value, Walk, whole_value


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
        m.library.device,
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
    return [whole_value(var, size) for var in made]


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
    slots = -(-m.library.context // SLOTS) * SLOTS
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
    "lfm.moe": lower_moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
