"""Operators of the fused program as steps: one function each, in a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.errors import UnsupportedError
from lfmc.passes.pattern import arguments
from lfmc.targets.executorch.experts import moe
from lfmc.targets.executorch.lower import Handler, Lowering
from lfmc.targets.executorch.recorder import number, numel_at_one
from lfmc.targets.executorch.steps import Host, Length, Number, Value, constant, most
from lfmc.targets.executorch.stored import stored

FLOAT = 6  # float32, as operators of ExecuTorch are told


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
    "lfm.moe": moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
