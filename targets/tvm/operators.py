"""The operators of a fused program in Relax: a table of one Python function per operator."""

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
from lfmc.targets.tvm.relax_function import FunctionBuilder, Handler, Value, full_value


def _embedding(builder: FunctionBuilder, node: fx.Node) -> Value:
    table, ids = arguments(node)[:2]
    parameter = builder.floats(table)
    rows, size = parameter.shape
    inputs = [builder.node_value(ids), *builder.parameter_vars(parameter)]
    return builder.call_single(
        builder.kernels.embedding,
        rows,
        size,
        parameter.dtype,
        builder.spec.tokens,
        inputs=inputs,
        size=size,
    )


def _embedding_nbits(builder: FunctionBuilder, node: fx.Node) -> Value:
    ids, codes, *_ = arguments(node)
    matrix, parts = builder.constants.matrix(builder.sources(codes))
    return builder.call_single(
        builder.kernels.embedding_nbits,
        matrix,
        builder.spec.tokens,
        inputs=[builder.node_value(ids), *builder.parameter_vars(*parts)],
        size=matrix.columns,
    )


def _linear(builder: FunctionBuilder, node: fx.Node) -> Value:
    x, weight, bias = (builder.node_value(arg) for arg in arguments(node))
    rows, columns = weight.shape
    biases = [bias] if bias else []
    inputs = [builder.materialize(x).var, *builder.parameter_vars(weight, *biases)]
    return builder.call_single(
        builder.kernels.float_linear,
        rows,
        columns,
        weight.dtype,
        builder.spec.tokens,
        inputs=inputs,
        size=rows,
        bias=bias.dtype if bias else None,
    )


def _linear_nbits(builder: FunctionBuilder, node: fx.Node) -> Value:
    x, codes, _, _, bias, *_ = arguments(node)
    matrix, parts = builder.constants.matrix(builder.sources(codes))
    biases = [builder.floats(bias)] if bias is not None else []
    activations = builder.activations(builder.node_value(x), matrix.format.group)
    inputs = [*activations, *builder.parameter_vars(*parts, *biases)]
    return builder.call_single(
        builder.kernels.linear,
        matrix.format,
        matrix.tail,
        builder.library.device,
        builder.product_tokens,
        inputs=inputs,
        size=matrix.rows,
        node=node,
        bias=biases[0].dtype if biases else None,
        exact=builder.spec.exact,
    )


def _rms_norm(builder: FunctionBuilder, node: fx.Node) -> Value:
    x, weight, eps = (builder.node_value(arg) for arg in arguments(node))
    (size,) = weight.shape
    inputs = [builder.materialize(x).var, *builder.parameter_vars(weight)]
    args = (size, weight.dtype, eps, builder.spec.tokens)
    return builder.call_single(builder.kernels.rms_norm, *args, inputs=inputs, size=size)


def _add_rms_norm(builder: FunctionBuilder, node: fx.Node) -> Sequence[Value]:
    x, residual, weight, eps = (builder.node_value(arg) for arg in arguments(node))
    (size,) = weight.shape
    operands = [builder.materialize(value).var for value in (x, residual)]
    inputs = [*operands, *builder.parameter_vars(weight)]
    args = (size, weight.dtype, eps, builder.spec.tokens)
    shapes = [(builder.length, size)] * 2
    results = builder.call(builder.kernels.add_rms_norm, *args, inputs=inputs, result_shapes=shapes)
    return [full_value(var, size) for var in results]


def _gated_short_conv(builder: FunctionBuilder, node: fx.Node) -> Sequence[Any]:
    bcx, weight, bias, state = arguments(node)
    taps = builder.floats(weight, taps=True)
    biases = [builder.floats(bias)] if bias is not None else []
    count, size = taps.shape
    y = builder.call_single(
        builder.kernels.gated_short_conv,
        size,
        count,
        taps.dtype,
        builder.spec.tokens,
        inputs=[
            builder.materialize(builder.node_value(bcx)).var,
            *builder.parameter_vars(taps, *biases),
        ],
        states=[state],
        size=size,
        bias=biases[0].dtype if biases else None,
    )
    return y, None


def _attention(builder: FunctionBuilder, node: fx.Node) -> Sequence[Any]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = arguments(node)
    config, tokens = builder.config, builder.spec.tokens
    slots = -(-builder.library.context // SLOTS) * SLOTS
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, slots)
    parts = [builder.node_value(x) for x in (q, k, v)]
    norms = [builder.floats(x) for x in (q_norm, k_norm)]
    kind = str(inv_freq.target).removeprefix("rope.")
    cos, sin = builder.cached(("angles", kind), lambda: _angles(builder, kind))
    size = heads.queries * heads.dim
    rotated = builder.call_single(
        builder.kernels.write_heads,
        heads,
        tuple(part.columns for part in parts),
        tuple(norm.dtype for norm in norms),
        eps,
        tokens,
        inputs=[
            *(part.var for part in parts),
            builder.start,
            *builder.parameter_vars(*norms),
            cos,
            sin,
        ],
        states=[keys, values],
        size=size,
    )
    inputs = [rotated.var, builder.start, builder.states[keys], builder.states[values]]
    y = builder.call_single(builder.kernels.attend, heads, window, tokens, inputs=inputs, size=size)
    return y, None, None


def _angles(builder: FunctionBuilder, kind: str) -> list[Any]:
    name, dim = f"rope.{kind}", builder.config.head_dim
    steps = builder.constants.config_constant(
        name, lambda: inverse_frequencies(builder.config, kind).float()
    )
    return builder.call(
        builder.kernels.angles,
        dim,
        builder.spec.tokens,
        inputs=[builder.start, *builder.parameter_vars(steps)],
        result_shapes=[(builder.length, dim)] * 2,
    )


def _swiglu(builder: FunctionBuilder, node: fx.Node) -> Value:
    gate, up = (builder.node_value(x) for x in node.args)
    inputs, size = [gate.var, up.var], gate.columns.size
    return builder.call_single(
        builder.kernels.swiglu,
        gate.columns,
        up.columns,
        builder.spec.tokens,
        inputs=inputs,
        size=size,
    )


def _view(builder: FunctionBuilder, node: fx.Node) -> Any:
    """Return the value of the input: another view of the same numbers."""
    return builder.node_value(arguments(node)[0])


def _split(builder: FunctionBuilder, node: fx.Node) -> Sequence[Value]:
    x, sizes, _ = arguments(node)  # the split is along the last dimension
    value = builder.materialize(builder.node_value(x))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        Value(value.var, Columns(value.columns.width, start, size))
        for start, size in zip(starts, sizes, strict=True)
    ]


def _getitem(builder: FunctionBuilder, node: fx.Node) -> Any:
    source, index = node.args
    return builder.node_value(source)[index]


def _binary(kind: str) -> Handler:
    def lower(builder: FunctionBuilder, node: fx.Node) -> Value:
        first, second = (builder.node_value(x) for x in node.args[:2])
        if isinstance(first, Parameter) or (
            isinstance(second, Value) and second.columns.size > first.columns.size
        ):
            first, second = second, first
        first = builder.materialize(first)
        size = first.columns.size
        if isinstance(second, Parameter):
            b_columns, constant = second.shape[0], second.dtype
            (second_var,) = builder.parameter_vars(second)
        else:
            second = builder.materialize(second)
            b_columns, constant, second_var = second.columns.size, None, second.var
        return builder.call_single(
            builder.kernels.binary,
            kind,
            size,
            b_columns,
            builder.spec.tokens,
            inputs=[first.var, second_var],
            size=size,
            constant=constant,
        )

    return lower


def _sigmoid(builder: FunctionBuilder, node: fx.Node) -> Value:
    x = builder.materialize(builder.node_value(node.args[0]))
    size = x.columns.size
    return builder.call_single(
        builder.kernels.sigmoids, size, builder.spec.tokens, inputs=[x.var], size=size
    )


def _skip(builder: FunctionBuilder, node: fx.Node) -> None:
    """Emit nothing. The operator that uses the node reads it (expert codes, symbolic sizes)."""


HANDLERS: dict[str, Handler] = {
    "aten.add": _binary("add"),
    "aten.embedding": _embedding,
    "aten.flatten": _view,
    "aten.linear": _linear,
    "aten.mul": _binary("mul"),
    "aten.sigmoid": _sigmoid,
    "aten.split_with_sizes": _split,
    "aten.unsqueeze": _view,
    "aten.view_as": _view,
    "getitem": _getitem,
    "lfm.add_rms_norm": _add_rms_norm,
    "lfm.attention": _attention,
    "lfm.dequantize": _skip,
    "lfm.embedding_nbits": _embedding_nbits,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear_nbits,
    "lfm.moe": lower_moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
