"""Handlers that lower the operators of the fused program to steps, one function per operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from lfmc.passes.pattern import arguments
from lfmc.targets.executorch.experts import moe
from lfmc.targets.executorch.lookup import embedding, embedding_nbits
from lfmc.targets.executorch.lower import Handler, Lowering
from lfmc.targets.executorch.recorder import numel_per_token, scalar
from lfmc.targets.executorch.steps import Integer, Length, RuntimeStep, Value, max_sizes


def _linear(m: Lowering, node: fx.Node) -> Value:
    x, weight, bias = (m.value(arg) for arg in arguments(node))
    return m.recorder.linear(x, weight, bias)


def _linear_nbits(m: Lowering, node: fx.Node) -> Value:
    x, codes, _, _, bias, *_ = arguments(node)
    return m.recorder.linear(m.value(x), m.matrix(codes), m.value(bias))


def _rms_norm(m: Lowering, node: fx.Node) -> Value:
    x, weight, eps = arguments(node)
    return m.recorder.norm(m.value(x), m.value(weight), eps)


def _add_rms_norm(m: Lowering, node: fx.Node) -> Sequence[Value]:
    x, residual, weight, eps = arguments(node)
    total = m.recorder.add(m.value(residual), m.value(x))
    return m.recorder.norm(total, m.value(weight), eps), total


def _gated_short_conv(m: Lowering, node: fx.Node) -> Sequence[Any]:
    bcx, weight, bias, state = arguments(node)
    recorder, state_value, taps = m.recorder, m.states[state], m.floats(weight, "taps")
    projection = m.value(bcx)
    size, count = max_sizes(projection.shape)[-1] // 3, max_sizes(state_value.shape)[1]
    gate, out_gate, x = (recorder.slice_last(projection, part * size, size) for part in range(3))
    shape = (1, Length(m.length.maximum + count), size)
    previous = recorder.multiply(state_value, m.state_factor())
    window = recorder.concatenate(previous, recorder.multiply(gate, x), 1, shape)
    end = m.cached("state end", lambda: _state_end(m, count))
    # The next call needs the last inputs; the copy writes them into the state in place.
    args, outputs = (window, 1, m.count, end, 1, state_value), (state_value,)
    recorder.steps.append(
        RuntimeStep("aten::slice_copy.Tensor_out", args, outputs, outputs, work=count * size)
    )
    mixed = recorder.depthwise_conv(window, taps, m.value(bias), m.length)
    return recorder.multiply(out_gate, mixed), None


def _state_end(m: Lowering, state_size: int) -> Integer:
    """Return the end of the rows that become the state: the call's tokens plus the state's size."""
    end = Integer()
    m.call_integer("executorch_prim::add.Scalar", (m.count, state_size), end)
    return end


def _attention(m: Lowering, node: fx.Node) -> Sequence[Any]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = arguments(node)
    config, recorder = m.program.config, m.recorder
    dim = config.head_dim
    cos, sin = m.rotary_tables(str(inv_freq.target).removeprefix("rope."))

    def heads(x: fx.Node, count: int) -> Value:
        return recorder.reshape(m.value(x), (1, m.length, count, dim))

    def rotated_heads(x: fx.Node, norm: fx.Node, count: int) -> Value:
        normed = recorder.norm(heads(x, count), m.value(norm), eps)
        first, second = (recorder.slice_last(normed, start, dim // 2) for start in (0, dim // 2))
        left = recorder.subtract(recorder.multiply(first, cos), recorder.multiply(second, sin))
        right = recorder.add(recorder.multiply(second, cos), recorder.multiply(first, sin))
        return recorder.concatenate(left, right, 3, normed.shape)

    query = rotated_heads(q, q_norm, config.num_heads)
    cache_writes = []
    for new, state in (
        (rotated_heads(k, k_norm, config.num_kv_heads), keys),
        (heads(v, config.num_kv_heads), values),
    ):
        output = Value((1,))
        write = (new, m.states[state], m.start, output)
        step = RuntimeStep("llama::update_cache.out", write, (output,), (output,))
        recorder.steps.append(step)
        cache_writes.append(output)
    mask = m.window_mask(window) if window else None
    y = Value(query.shape)
    caches = (m.states[keys], m.states[values])
    args = (query, *caches, m.start, mask, 0.0, mask is None, dim**-0.5, y)
    work = 2 * numel_per_token(query.shape)
    recorder.steps.append(
        RuntimeStep(
            "llama::custom_sdpa.out",
            args,
            (y,),
            (y,),
            dependencies=tuple(cache_writes),
            work=work,
        )
    )
    return y, None, None


def _swiglu(m: Lowering, node: fx.Node) -> Value:
    gate, up = (m.value(x) for x in node.args)
    return m.recorder.multiply(m.recorder.silu(gate), up)


def _flatten(m: Lowering, node: fx.Node) -> Value:
    x, start, end = arguments(node)
    value = m.value(x)
    last = end % len(value.shape)
    sizes = value.shape[start : last + 1]
    merged: Any = 1
    for size in sizes:
        merged = size if merged == 1 else merged if size == 1 else merged * size
    return m.recorder.reshape(value, (*value.shape[:start], merged, *value.shape[last + 1 :]))


def _view_as(m: Lowering, node: fx.Node) -> Value:
    x, other = (m.value(arg) for arg in node.args)
    return m.recorder.reshape(x, other.shape)


def _split(m: Lowering, node: fx.Node) -> Sequence[Value]:
    x, sizes, _ = arguments(node)  # of the last dim
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        m.recorder.slice_last(m.value(x), start, size)
        for start, size in zip(starts, sizes, strict=True)
    ]


def _getitem(m: Lowering, node: fx.Node) -> Any:
    source, index = node.args
    return m.value(source)[index]


def _unsqueeze(m: Lowering, node: fx.Node) -> Value:
    x, dim = arguments(node)
    value = m.value(x)
    shape = list(value.shape)
    shape.insert(dim % (len(shape) + 1), 1)
    return m.recorder.reshape(value, tuple(shape))


def _operands(m: Lowering, node: fx.Node) -> list[Value]:
    """Return the arguments of a node; numbers become constants."""
    values = (m.value(x) for x in node.args)
    return [x if isinstance(x, Value) else scalar(float(x)) for x in values]


def _add(m: Lowering, node: fx.Node) -> Value:
    return m.recorder.add(*_operands(m, node))


def _mul(m: Lowering, node: fx.Node) -> Value:
    return m.recorder.multiply(*_operands(m, node))


def _sigmoid(m: Lowering, node: fx.Node) -> Value:
    return m.recorder.sigmoid(m.value(node.args[0]))


def _skip(m: Lowering, node: fx.Node) -> None:
    """Lower nothing: the operator that uses this node reads its arguments directly."""


HANDLERS: dict[str, Handler] = {
    "aten.add": _add,
    "aten.embedding": embedding,
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
    "lfm.dequantize": _skip,
    "lfm.embedding_nbits": embedding_nbits,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear_nbits,
    "lfm.moe": moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
