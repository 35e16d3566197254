"""The table of functions that lower each operator of the fused program to an ML program."""

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


def _widen(a: Var, b: Var) -> tuple[Var, Var]:
    """Cast both to the wider of their dtypes."""
    dtype = WIDE if WIDE in (a.dtype, b.dtype) else HALF
    return cast(a, dtype), cast(b, dtype)


def _embedding(lowering: Lowering, node: fx.Node) -> Var:
    table, ids, *_ = arguments(node)
    return lookup(lowering.matrix(table), lowering.value(ids), node.name)


def _embedding_nbits(lowering: Lowering, node: fx.Node) -> Var:
    ids, codes, _, _, bits, *_ = arguments(node)
    rows = lookup(lowering.matrix(codes), lowering.value(ids), node.name)
    return lowering.probe(node, f"gather {bits} bit", lowering.value(ids), rows)


def _linear(lowering: Lowering, node: fx.Node) -> Var:
    x, weight, bias = arguments(node)
    pieces = lowering.matrix(weight)
    return product(lowering, pieces, lowering.value(x, pieces[0].dtype), bias, node.name)


def _linear_nbits(lowering: Lowering, node: fx.Node) -> Var:
    x, codes, _, _, bias, bits, *_ = arguments(node)
    x = lowering.value(x, HALF)
    y = product(lowering, lowering.matrix(codes), x, bias, node.name)
    return lowering.probe(node, f"linear {bits} bit", x, y)


def _norm(lowering: Lowering, x: Var, weight: fx.Node, eps: Any) -> Var:
    """Return `weight * x / sqrt(mean(x^2) + eps)`, in float32: float16 overflows at 65,504."""
    wide = cast(x, WIDE)
    mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
    normed = mb.mul(x=wide, y=mb.rsqrt(x=mean, epsilon=np.float32(eps)))
    return mb.mul(x=normed, y=lowering.value(weight, WIDE))


def _rms_norm(lowering: Lowering, node: fx.Node) -> Var:
    x, weight, eps = arguments(node)
    return cast(_norm(lowering, lowering.value(x), weight, eps), HALF)


def _add_rms_norm(lowering: Lowering, node: fx.Node) -> Sequence[Var]:
    x, residual, weight, eps = arguments(node)
    total = mb.add(x=lowering.value(residual, HALF), y=lowering.value(x, HALF))
    return cast(_norm(lowering, total, weight, eps), HALF), total


def _gated_short_conv(lowering: Lowering, node: fx.Node) -> Sequence[Var]:
    bcx, weight, bias, state = arguments(node)
    gate, out_gate, x = mb.split(x=lowering.value(bcx, HALF), num_splits=3, axis=-1)
    inputs = mb.concat(values=[lowering.value(state), mb.mul(x=gate, y=x)], axis=1)
    filters = lowering.value(weight)
    bias_argument = {} if bias is None else {"bias": lowering.value(bias, filters.dtype)}
    mixed = mb.conv(
        x=mb.transpose(x=cast(inputs, filters.dtype), perm=[0, 2, 1]),
        weight=filters,
        groups=filters.shape[0],
        pad_type="valid",
        **bias_argument,
    )
    y = mb.mul(x=out_gate, y=cast(mb.transpose(x=mixed, perm=[0, 2, 1]), HALF))
    state_length = lowering.values[state].shape[1]
    end = np.array([lowering.tokens], np.int32) if lowering.valid is None else lowering.valid
    zero = np.zeros(1, np.int32)
    begin = mb.concat(values=[zero, end, zero], axis=0)
    new = mb.slice_by_size(x=inputs, begin=begin, size=[1, state_length, inputs.shape[2]])
    return y, new


def _attention(lowering: Lowering, node: fx.Node) -> Sequence[Var]:
    q, k, v, q_norm, k_norm, inv_freq, _, keys, values, eps, window, _ = arguments(node)
    config, tokens = lowering.program.config, lowering.tokens
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    cos, sin = lowering.rotation(inv_freq)

    def split(x: Var, count: int) -> Var:
        return mb.reshape(x=x, shape=[1, tokens, count, dim])

    def normalize_and_rotate(x: Any, norm: fx.Node, count: int) -> Var:
        """Return `x` normalized and rotated, float32 `[1, count, T, D]`."""
        normed = _norm(lowering, split(lowering.value(x), count), norm, eps)
        first, second = mb.split(x=mb.transpose(x=normed, perm=[0, 2, 1, 3]), num_splits=2, axis=-1)
        return mb.concat(values=sum_of_angles([first, second], [cos, sin]), axis=-1)

    # The rotation of (x1, x2) is (x1 cos - x2 sin, x2 cos + x1 sin): a scaled sum of two angles.
    queries = cast(mb.mul(x=normalize_and_rotate(q, q_norm, heads), y=np.float32(dim**-0.5)), HALF)
    new_keys = _update_cache(lowering, keys, cast(normalize_and_rotate(k, k_norm, kv_heads), HALF))
    split_values = mb.transpose(x=split(lowering.value(v, HALF), kv_heads), perm=[0, 2, 1, 3])
    new_values = _update_cache(lowering, values, split_values)
    # Queries that share a key head are rows of one product, so keys are not repeated.
    grouped = mb.reshape(x=queries, shape=[1, kv_heads, heads // kv_heads * tokens, dim])
    scores = mb.matmul(x=grouped, y=new_keys, transpose_y=True)
    scores = mb.reshape(x=scores, shape=[1, heads, tokens, lowering.context])
    shares = mb.softmax(x=mb.add(x=scores, y=lowering.mask(window)), axis=-1)
    shares = mb.reshape(x=shares, shape=(*grouped.shape[:3], lowering.context))
    mixed = mb.reshape(x=mb.matmul(x=shares, y=new_values), shape=[1, heads, tokens, dim])
    return mb.transpose(x=mixed, perm=[0, 2, 1, 3]), new_keys, new_values


def _update_cache(lowering: Lowering, cache: fx.Node, new: Var) -> Var:
    """Return the cache `[1, K, C, D]` with `new` `[1, K, T, D]` from the start position on."""
    old, zero = lowering.value(cache), np.zeros(1, np.int32)
    end = mb.add(x=lowering.start, y=np.int32(lowering.tokens))
    return mb.slice_update(
        x=old,
        update=new,
        begin=mb.concat(values=[zero, zero, lowering.start, zero], axis=0),
        end=mb.concat(values=[zero, zero, end, zero], axis=0),
        stride=[1, 1, 1, 1],
        begin_mask=[True, True, False, True],
        end_mask=[True, True, False, True],
    )


def _swiglu(lowering: Lowering, node: fx.Node) -> Var:
    gate, up = (lowering.value(x, HALF) for x in node.args)
    return mb.mul(x=mb.silu(x=gate), y=up)


def _sigmoid(lowering: Lowering, node: fx.Node) -> Var:
    return mb.sigmoid(x=lowering.value(node.args[0]))


def _split(lowering: Lowering, node: fx.Node) -> Sequence[Var]:
    x, sizes, dim = arguments(node)
    parts: Sequence[Var] = mb.split(x=lowering.value(x), split_sizes=list(sizes), axis=dim)
    return parts


def _getitem(lowering: Lowering, node: fx.Node) -> Var:
    source, index = arguments(node)
    return lowering.values[source][index]


def _flatten(lowering: Lowering, node: fx.Node) -> Var:
    x, start, end = arguments(node)
    x = lowering.value(x)
    end = end % len(x.shape)
    size = int(np.prod(x.shape[start : end + 1]))
    return mb.reshape(x=x, shape=[*x.shape[:start], size, *x.shape[end + 1 :]])


def _view_as(lowering: Lowering, node: fx.Node) -> Var:
    x, like = (lowering.value(arg) for arg in node.args)
    return mb.reshape(x=x, shape=list(like.shape))


def _unsqueeze(lowering: Lowering, node: fx.Node) -> Var:
    x, dim = node.args
    return mb.expand_dims(x=lowering.value(x), axes=[dim])


def _add(lowering: Lowering, node: fx.Node) -> Var:
    a, b = _widen(*(lowering.value(x) for x in node.args))
    return mb.add(x=a, y=b)


def _mul(lowering: Lowering, node: fx.Node) -> Var:
    a, b = _widen(*(lowering.value(x) for x in node.args))
    return mb.mul(x=a, y=b)


def _skip(lowering: Lowering, node: fx.Node) -> None:
    """Emit nothing: the operator that uses the value reads it (expert codes, a symbolic size)."""


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
    "lfm.dequantize": _skip,
    "lfm.embedding_nbits": _embedding_nbits,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear_nbits,
    "lfm.moe": lower_moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
