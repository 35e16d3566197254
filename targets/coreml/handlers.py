"""Operators of the fused program in an ML program: one function each, in a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var
from torch import fx

from lfmc.passes.pattern import arguments
from lfmc.targets.coreml.dtypes import HALF, WIDE, cast
from lfmc.targets.coreml.lower import Handler, Lowering
from lfmc.targets.coreml.moe import lower_moe
from lfmc.targets.coreml.rotary import sum_of_angles
from lfmc.targets.coreml.tall_matrices import lookup, product


def _like(a: Var, b: Var) -> tuple[Var, Var]:
    """Both in the wider dtype of the two."""
    dtype = WIDE if WIDE in (a.dtype, b.dtype) else HALF
    return cast(a, dtype), cast(b, dtype)


def _embedding(low: Lowering, node: fx.Node) -> Var:
    table, ids, *_ = arguments(node)
    return lookup(low.matrix(table), low.value(ids), node.name)


def _embedding_nbits(low: Lowering, node: fx.Node) -> Var:
    ids, codes, _, _, bits, *_ = arguments(node)
    rows = lookup(low.matrix(codes), low.value(ids), node.name)
    return low.probe(node, f"gather {bits} bit", low.value(ids), rows)


def _linear(low: Lowering, node: fx.Node) -> Var:
    x, weight, bias = arguments(node)
    pieces = low.matrix(weight)
    return product(low, pieces, low.value(x, pieces[0].dtype), bias, node.name)


def _linear_nbits(low: Lowering, node: fx.Node) -> Var:
    x, codes, _, _, bias, bits, *_ = arguments(node)
    given = low.value(x, HALF)
    y = product(low, low.matrix(codes), given, bias, node.name)
    return low.probe(node, f"linear {bits} bit", given, y)


def _norm(low: Lowering, x: Var, weight: fx.Node, eps: Any) -> Var:
    """`weight * x / sqrt(mean(x^2) + eps)` in float32: a square above 65,504 is no float16."""
    wide = cast(x, WIDE)
    mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
    normed = mb.mul(x=wide, y=mb.rsqrt(x=mean, epsilon=np.float32(eps)))
    return mb.mul(x=normed, y=low.value(weight, WIDE))


def _rms_norm(low: Lowering, node: fx.Node) -> Var:
    x, weight, eps = arguments(node)
    return cast(_norm(low, low.value(x), weight, eps), HALF)


def _add_rms_norm(low: Lowering, node: fx.Node) -> Sequence[Var]:
    x, residual, weight, eps = arguments(node)
    total = mb.add(x=low.value(residual, HALF), y=low.value(x, HALF))
    return cast(_norm(low, total, weight, eps), HALF), total


def _gated_short_conv(low: Lowering, node: fx.Node) -> Sequence[Var]:
    bcx, weight, bias, state = arguments(node)
    gate, out_gate, x = mb.split(x=low.value(bcx, HALF), num_splits=3, axis=-1)
    seen = mb.concat(values=[low.value(state), mb.mul(x=gate, y=x)], axis=1)
    filters = low.value(weight)
    given = {} if bias is None else {"bias": low.value(bias, filters.dtype)}
    mixed = mb.conv(
        x=mb.transpose(x=cast(seen, filters.dtype), perm=[0, 2, 1]),
        weight=filters,
        groups=filters.shape[0],
        pad_type="valid",
        **given,
    )
    y = mb.mul(x=out_gate, y=cast(mb.transpose(x=mixed, perm=[0, 2, 1]), HALF))
    kept = low.values[state].shape[1]
    last = np.array([low.tokens], np.int32) if low.valid is None else low.valid
    zero = np.zeros(1, np.int32)
    begin = mb.concat(values=[zero, last, zero], axis=0)
    new = mb.slice_by_size(x=seen, begin=begin, size=[1, kept, seen.shape[2]])
    return y, new


def _attention(low: Lowering, node: fx.Node) -> Sequence[Var]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = arguments(node)
    config, tokens = low.program.config, low.tokens
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    cos, sin = low.rotation(inv_freq)

    def split(x: Var, count: int) -> Var:
        return mb.reshape(x=x, shape=[1, tokens, count, dim])

    def turned(x: Any, norm: fx.Node, count: int) -> Var:
        """Normalized and rotated, float32 `[1, count, T, D]`."""
        normed = _norm(low, split(low.value(x), count), norm, eps)
        first, second = mb.split(x=mb.transpose(x=normed, perm=[0, 2, 1, 3]), num_splits=2, axis=-1)
        return mb.concat(values=sum_of_angles([first, second], [cos, sin]), axis=-1)

    # (x1, x2) turned is (x1 cos - x2 sin, x2 cos + x1 sin): the sum of two angles, scaled.
    queries = cast(mb.mul(x=turned(q, q_norm, heads), y=np.float32(dim**-0.5)), HALF)
    new_keys = _write(low, keys, cast(turned(k, k_norm, kv_heads), HALF))
    split_values = mb.transpose(x=split(low.value(v, HALF), kv_heads), perm=[0, 2, 1, 3])
    new_values = _write(low, values, split_values)
    # Queries that share a key head are rows of one product: keys are not repeated.
    grouped = mb.reshape(x=queries, shape=[1, kv_heads, heads // kv_heads * tokens, dim])
    scores = mb.matmul(x=grouped, y=new_keys, transpose_y=True)
    scores = mb.reshape(x=scores, shape=[1, heads, tokens, low.context])
    shares = mb.softmax(x=mb.add(x=scores, y=low.mask(window)), axis=-1)
    shares = mb.reshape(x=shares, shape=(*grouped.shape[:3], low.context))
    mixed = mb.reshape(x=mb.matmul(x=shares, y=new_values), shape=[1, heads, tokens, dim])
    return mb.transpose(x=mixed, perm=[0, 2, 1, 3]), new_keys, new_values


def _write(low: Lowering, cache: fx.Node, new: Var) -> Var:
    """The cache `[1, K, C, D]` with `new` `[1, K, T, D]` from the start position on."""
    old, zero = low.value(cache), np.zeros(1, np.int32)
    end = mb.add(x=low.start, y=np.int32(low.tokens))
    return mb.slice_update(
        x=old,
        update=new,
        begin=mb.concat(values=[zero, zero, low.start, zero], axis=0),
        end=mb.concat(values=[zero, zero, end, zero], axis=0),
        stride=[1, 1, 1, 1],
        begin_mask=[True, True, False, True],
        end_mask=[True, True, False, True],
    )


def _swiglu(low: Lowering, node: fx.Node) -> Var:
    gate, up = (low.value(x, HALF) for x in node.args)
    return mb.mul(x=mb.silu(x=gate), y=up)


def _sigmoid(low: Lowering, node: fx.Node) -> Var:
    return mb.sigmoid(x=low.value(node.args[0]))


def _split(low: Lowering, node: fx.Node) -> Sequence[Var]:
    x, sizes, dim = arguments(node)
    parts: Sequence[Var] = mb.split(x=low.value(x), split_sizes=list(sizes), axis=dim)
    return parts


def _getitem(low: Lowering, node: fx.Node) -> Var:
    source, index = arguments(node)
    return low.values[source][index]


def _flatten(low: Lowering, node: fx.Node) -> Var:
    x, start, end = arguments(node)
    given = low.value(x)
    end = end % len(given.shape)
    size = int(np.prod(given.shape[start : end + 1]))
    return mb.reshape(x=given, shape=[*given.shape[:start], size, *given.shape[end + 1 :]])


def _view_as(low: Lowering, node: fx.Node) -> Var:
    x, like = (low.value(arg) for arg in node.args)
    return mb.reshape(x=x, shape=list(like.shape))


def _unsqueeze(low: Lowering, node: fx.Node) -> Var:
    x, dim = node.args
    return mb.expand_dims(x=low.value(x), axes=[dim])


def _add(low: Lowering, node: fx.Node) -> Var:
    a, b = _like(*(low.value(x) for x in node.args))
    return mb.add(x=a, y=b)


def _mul(low: Lowering, node: fx.Node) -> Var:
    a, b = _like(*(low.value(x) for x in node.args))
    return mb.mul(x=a, y=b)


def _nothing(low: Lowering, node: fx.Node) -> None:
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
    "lfm.moe": lower_moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
