"""Operators of the fused program in an ONNX graph: one function each, in a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx

from lfmc.graph.program import operator_name
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.targets.onnx.emitter import CONTRIB
from lfmc.targets.onnx.lower import Handler, Lowering
from lfmc.targets.onnx.moe import lower_moe


def _embedding(low: Lowering, node: fx.Node) -> ir.Value:
    table, ids = node.args[:2]
    return low.emit.op("Gather", low.value(table), low.value(ids), axis=0)


def _embedding_nbits(low: Lowering, node: fx.Node) -> ir.Value:
    ids, codes, _, _, bits, group, _ = arguments(node)
    q, scales, zeros = low.quantized(codes)
    rows = low.emit.op(
        "GatherBlockQuantized",
        *(q, low.value(ids), scales, zeros),
        domain=CONTRIB,
        bits=bits,
        block_size=group,
        gather_axis=0,
        quantize_axis=1,
    )
    return low.probe(node, f"GatherBlockQuantized {bits} bit", [ids], rows)


def _linear(low: Lowering, node: fx.Node) -> ir.Value:
    x, weight, bias = arguments(node)
    turned = low.emit.op("Transpose", low.value(weight), perm=[1, 0])  # folded at load
    y = low.emit.op("MatMul", low.value(x), turned)
    return y if bias is None else low.emit.op("Add", y, low.value(bias))


def _linear_nbits(low: Lowering, node: fx.Node) -> ir.Value:
    x, codes, _, _, bias, bits, group, columns = arguments(node)
    q, scales, zeros = low.quantized(codes)
    rows, width = codes.meta["val"].shape
    groups = -(-columns // group)
    # The embedding gathers rows of the same table, so it is stored flat and viewed here.
    blocks = low.emit.op("Reshape", q, low.emit.ints(rows, groups, width // groups))
    y = low.emit.op(
        "MatMulNBits",
        *(low.value(x), blocks, scales, zeros),
        domain=CONTRIB,
        K=columns,
        N=rows,
        bits=bits,
        block_size=group,
        accuracy_level=low.accuracy_level,
    )
    low.probe(node, f"MatMulNBits {bits} bit", [x], y)
    return y if bias is None else low.emit.op("Add", y, low.value(bias))


def _rms_norm(low: Lowering, node: fx.Node) -> ir.Value:
    x, weight, eps = node.args
    return _norm(low, low.value(x), weight, eps)


def _norm(low: Lowering, x: ir.Value, weight: Any, eps: Any) -> ir.Value:
    scale = low.value(weight)
    return low.emit.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=eps, stash_type=1)


def _add_rms_norm(low: Lowering, node: fx.Node) -> Sequence[ir.Value]:
    x, residual, weight, eps = node.args
    inputs = (low.value(residual), low.value(x), low.value(weight))
    normed, _, _, total = low.emit.ops(
        4, "SkipSimplifiedLayerNormalization", *inputs, domain=CONTRIB, epsilon=eps
    )
    return normed, total


def _gated_short_conv(low: Lowering, node: fx.Node) -> Sequence[ir.Value]:
    bcx, weight, bias, state = node.args
    emit = low.emit
    gate, out_gate, x = emit.ops(3, "Split", low.value(bcx), axis=-1, num_outputs=3)
    taps = weight.meta["val"].shape[2] - 1  # type: ignore[union-attr]
    filter_bias = None if bias is None else low.value(bias)
    seen = emit.op("Mul", gate, x)
    y, new_state = low.layout.conv(
        emit, seen, low.value(weight), filter_bias, low.value(state), taps
    )
    return emit.op("Mul", out_gate, y), new_state


def _attention(low: Lowering, node: fx.Node) -> Sequence[ir.Value]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = node.args
    emit, config = low.emit, low.program.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim

    def normed(x: Any, weight: Any, count: int) -> ir.Value:
        split = emit.op("Reshape", low.value(x), emit.ints(0, 0, count, dim))
        split = _norm(low, split, weight, eps)
        return emit.op("Reshape", split, emit.ints(0, 0, count * dim))

    cos, sin = _rotation_tables(low, inv_freq)
    y, new_keys, new_values = emit.ops(
        3,
        "GroupQueryAttention",
        *(normed(q, q_norm, heads), normed(k, k_norm, kv_heads), low.value(v)),
        *(low.value(keys), low.value(values), low.last, low.total, cos, sin),
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=float(dim**-0.5),
        do_rotary=1,
        rotary_interleaved=0,
        local_window_size=window or -1,
    )
    split = emit.op("Reshape", y, emit.ints(0, 0, heads, dim))
    low.flat_heads[node] = y
    return split, new_keys, new_values


def _rotation_tables(low: Lowering, inv_freq: Any) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine `[context, D / 2]`, computed when a session starts and not stored.

    Every input is constant, so ONNX Runtime folds the chain: no bytes in the file, no work a token.
    """
    if inv_freq not in low.values:
        emit, kind = low.emit, str(inv_freq.target).removeprefix("rope.")
        steps = inverse_frequencies(low.program.config, kind).numpy()
        ends = [np.array(n, np.float32) for n in (0, low.context, 1)]
        slots = emit.op("Range", *map(emit.constant, ends))
        angles = emit.op("Mul", emit.op("Unsqueeze", slots, emit.ints(1)), emit.constant(steps))
        low.values[inv_freq] = (emit.op("Cos", angles), emit.op("Sin", angles))
    tables: tuple[ir.Value, ir.Value] = low.values[inv_freq]
    return tables


def _swiglu(low: Lowering, node: fx.Node) -> ir.Value:
    gate, up = (low.value(x) for x in node.args)
    # QuickGelu with alpha 1 is x * sigmoid(x).
    return low.emit.op("Mul", low.emit.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)


def _sigmoid(low: Lowering, node: fx.Node) -> ir.Value:
    """Spelled out: ONNX Runtime's own Sigmoid is off by 9e-8, a large share of a small score."""
    emit = low.emit
    grown = emit.op("Exp", emit.op("Neg", low.value(node.args[0])))
    return emit.op("Reciprocal", emit.op("Add", grown, emit.number(1.0)))


def _split(low: Lowering, node: fx.Node) -> Sequence[ir.Value]:
    x, sizes, dim = arguments(node)
    return low.emit.ops(len(sizes), "Split", low.value(x), low.emit.ints(*sizes), axis=dim)


def _getitem(low: Lowering, node: fx.Node) -> ir.Value:
    source, index = node.args
    return low.values[source][index]  # type: ignore[no-any-return, index]


def _flatten(low: Lowering, node: fx.Node) -> ir.Value:
    x, start, end = arguments(node)
    source = x.args[0] if operator_name(x) == "getitem" else None
    if source in low.flat_heads and x.args[1] == 0:
        return low.flat_heads[source]
    kept = [0] * start + [-1]
    if end not in (-1, x.meta["val"].dim() - 1):
        kept += [int(size) for size in x.meta["val"].shape[end + 1 :]]
    return low.emit.op("Reshape", low.value(x), low.emit.ints(*kept))


def _view_as(low: Lowering, node: fx.Node) -> ir.Value:
    x, like = node.args
    return low.emit.op("Reshape", low.value(x), low.emit.op("Shape", low.value(like)))


def _unsqueeze(low: Lowering, node: fx.Node) -> ir.Value:
    x, dim = node.args
    return low.emit.op("Unsqueeze", low.value(x), low.emit.ints(dim))  # type: ignore[arg-type]


def _binary(kind: str) -> Handler:
    def emit(low: Lowering, node: fx.Node) -> ir.Value:
        a, b = (low.value(x) for x in node.args)
        return low.emit.op(kind, a, b)

    return emit


def _nothing(low: Lowering, node: fx.Node) -> None:
    """Read by the operator that uses it (an expert's codes, a symbolic size)."""


HANDLERS: dict[str, Handler] = {
    "aten.add": _binary("Add"),
    "aten.embedding": _embedding,
    "aten.flatten": _flatten,
    "aten.linear": _linear,
    "aten.mul": _binary("Mul"),
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
    "lfm.moe": lower_moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
