"""The table of functions that lower each operator of the fused program to ONNX nodes."""

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
from lfmc.targets.onnx.lookup import lookup
from lfmc.targets.onnx.lower import Handler, Lowering
from lfmc.targets.onnx.moe import lower_moe


def _embedding(lowering: Lowering, node: fx.Node) -> ir.Value:
    table, ids = node.args[:2]
    return lowering.emitter.op("Gather", lowering.value(table), lowering.value(ids), axis=0)


def _embedding_nbits(lowering: Lowering, node: fx.Node) -> ir.Value:
    ids, codes, _, _, bits, group, columns = arguments(node)
    q, scales, zeros = lowering.quantized(codes)
    if lowering.layout.runs_in_browsers:
        table = (q, scales, zeros)
        rows = lookup(lowering.emitter, lowering.value(ids), *table, bits, group, columns // group)
        return lowering.probe(node, f"Gather {bits} bit", [ids], rows)
    rows = lowering.emitter.op(
        "GatherBlockQuantized",
        *(q, lowering.value(ids), scales, zeros),
        domain=CONTRIB,
        bits=bits,
        block_size=group,
        gather_axis=0,
        quantize_axis=1,
    )
    return lowering.probe(node, f"GatherBlockQuantized {bits} bit", [ids], rows)


def _linear(lowering: Lowering, node: fx.Node) -> ir.Value:
    x, weight, bias = arguments(node)
    # ONNX Runtime folds the Transpose when a session starts.
    transposed = lowering.emitter.op("Transpose", lowering.value(weight), perm=[1, 0])
    y = lowering.emitter.op("MatMul", lowering.head_input(node, lowering.value(x)), transposed)
    return y if bias is None else lowering.emitter.op("Add", y, lowering.value(bias))


def _linear_nbits(lowering: Lowering, node: fx.Node) -> ir.Value:
    x, codes, _, _, bias, bits, group, columns = arguments(node)
    q, scales, zeros = lowering.quantized(codes)
    rows, width = codes.meta["val"].shape
    groups = -(-columns // group)
    # A tied embedding gathers rows of this table, so the table is stored flat and reshaped here.
    blocks = lowering.emitter.op("Reshape", q, lowering.emitter.ints(rows, groups, width // groups))
    y = lowering.emitter.op(
        "MatMulNBits",
        *(lowering.head_input(node, lowering.value(x)), blocks, scales, zeros),
        domain=CONTRIB,
        K=columns,
        N=rows,
        bits=bits,
        block_size=group,
        accuracy_level=lowering.accuracy_level,
    )
    lowering.probe(node, f"MatMulNBits {bits} bit", [x], y)
    return y if bias is None else lowering.emitter.op("Add", y, lowering.value(bias))


def _rms_norm(lowering: Lowering, node: fx.Node) -> ir.Value:
    x, weight, eps = node.args
    return _norm(lowering, lowering.value(x), weight, eps)


def _norm(lowering: Lowering, x: ir.Value, weight: Any, eps: Any) -> ir.Value:
    scale = lowering.value(weight)
    return lowering.emitter.op(
        "SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=eps, stash_type=1
    )


def _add_rms_norm(lowering: Lowering, node: fx.Node) -> Sequence[ir.Value]:
    x, residual, weight, eps = node.args
    inputs = (lowering.value(residual), lowering.value(x), lowering.value(weight))
    normed, _, _, total = lowering.emitter.ops(
        4, "SkipSimplifiedLayerNormalization", *inputs, domain=CONTRIB, epsilon=eps
    )
    return normed, total


def _gated_short_conv(lowering: Lowering, node: fx.Node) -> Sequence[ir.Value]:
    bcx, weight, bias, state = node.args
    emitter = lowering.emitter
    gate, out_gate, x = emitter.ops(3, "Split", lowering.value(bcx), axis=-1, num_outputs=3)
    taps = weight.meta["val"].shape[2] - 1  # type: ignore[union-attr]
    filter_bias = None if bias is None else lowering.value(bias)
    gated = emitter.op("Mul", gate, x)
    y, new_state = lowering.layout.conv(
        emitter, gated, lowering.value(weight), filter_bias, lowering.value(state), taps
    )
    return emitter.op("Mul", out_gate, y), new_state


def _attention(lowering: Lowering, node: fx.Node) -> Sequence[ir.Value]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = node.args
    emitter, config = lowering.emitter, lowering.program.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim

    def normed(x: Any, weight: Any, count: int) -> ir.Value:
        split = emitter.op("Reshape", lowering.value(x), emitter.ints(0, 0, count, dim))
        split = _norm(lowering, split, weight, eps)
        return emitter.op("Reshape", split, emitter.ints(0, 0, count * dim))

    cos, sin = _rotation_tables(lowering, inv_freq)
    y, new_keys, new_values = emitter.ops(
        3,
        "GroupQueryAttention",
        *(normed(q, q_norm, heads), normed(k, k_norm, kv_heads), lowering.value(v)),
        *(lowering.value(keys), lowering.value(values), lowering.last, lowering.total, cos, sin),
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=float(dim**-0.5),
        do_rotary=1,
        rotary_interleaved=0,
        local_window_size=window or -1,
    )
    split = emitter.op("Reshape", y, emitter.ints(0, 0, heads, dim))
    lowering.flat_heads[node] = y
    return split, new_keys, new_values


def _rotation_tables(lowering: Lowering, inv_freq: Any) -> tuple[ir.Value, ir.Value]:
    """Return cosine and sine `[context, D / 2]`, which ONNX Runtime computes when a session starts.

    Every input is constant, so ONNX Runtime folds these nodes: the file stores no tables, and a
    token costs no extra work.
    """
    if inv_freq not in lowering.values:
        emitter, kind = lowering.emitter, str(inv_freq.target).removeprefix("rope.")
        steps = inverse_frequencies(lowering.program.config, kind).numpy()
        ends = [np.array(n, np.float32) for n in (0, lowering.context, 1)]
        slots = emitter.op("Range", *map(emitter.constant, ends))
        angles = emitter.op(
            "Mul", emitter.op("Unsqueeze", slots, emitter.ints(1)), emitter.constant(steps)
        )
        lowering.values[inv_freq] = (emitter.op("Cos", angles), emitter.op("Sin", angles))
    tables: tuple[ir.Value, ir.Value] = lowering.values[inv_freq]
    return tables


def _swiglu(lowering: Lowering, node: fx.Node) -> ir.Value:
    gate, up = (lowering.value(x) for x in node.args)
    # QuickGelu with alpha 1 is x * sigmoid(x).
    return lowering.emitter.op(
        "Mul", lowering.emitter.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up
    )


def _sigmoid(lowering: Lowering, node: fx.Node) -> ir.Value:
    """Compute 1 / (1 + exp(-x)): ONNX Runtime's Sigmoid has an error of 9e-8, which is large for a
    small score."""
    emitter = lowering.emitter
    exponential = emitter.op("Exp", emitter.op("Neg", lowering.value(node.args[0])))
    return emitter.op("Reciprocal", emitter.op("Add", exponential, emitter.number(1.0)))


def _split(lowering: Lowering, node: fx.Node) -> Sequence[ir.Value]:
    x, sizes, dim = arguments(node)
    return lowering.emitter.ops(
        len(sizes), "Split", lowering.value(x), lowering.emitter.ints(*sizes), axis=dim
    )


def _getitem(lowering: Lowering, node: fx.Node) -> ir.Value:
    source, index = node.args
    return lowering.values[source][index]  # type: ignore[no-any-return, index]


def _flatten(lowering: Lowering, node: fx.Node) -> ir.Value:
    x, start, end = arguments(node)
    source = x.args[0] if operator_name(x) == "getitem" else None
    if source in lowering.flat_heads and x.args[1] == 0:
        return lowering.flat_heads[source]
    shape = [0] * start + [-1]
    if end not in (-1, x.meta["val"].dim() - 1):
        shape += [int(size) for size in x.meta["val"].shape[end + 1 :]]
    return lowering.emitter.op("Reshape", lowering.value(x), lowering.emitter.ints(*shape))


def _view_as(lowering: Lowering, node: fx.Node) -> ir.Value:
    x, like = node.args
    return lowering.emitter.op(
        "Reshape", lowering.value(x), lowering.emitter.op("Shape", lowering.value(like))
    )


def _unsqueeze(lowering: Lowering, node: fx.Node) -> ir.Value:
    x, dim = node.args
    return lowering.emitter.op("Unsqueeze", lowering.value(x), lowering.emitter.ints(dim))  # type: ignore[arg-type]


def _binary(kind: str) -> Handler:
    def lower(lowering: Lowering, node: fx.Node) -> ir.Value:
        a, b = (lowering.value(x) for x in node.args)
        return lowering.emitter.op(kind, a, b)

    return lower


def _skip(lowering: Lowering, node: fx.Node) -> None:
    """Emit nothing: the operator that uses the value reads it (expert codes, a symbolic size)."""


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
    "lfm.dequantize": _skip,
    "lfm.embedding_nbits": _embedding_nbits,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear_nbits,
    "lfm.moe": lower_moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
