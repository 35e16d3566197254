"""Sparse experts as steps: each on the tokens that chose it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lfmc.passes.pattern import arguments
from lfmc.targets.executorch.lower import Lowering
from lfmc.targets.executorch.steps import Block, Element, Host, Matrix, Only, Value


def moe(m: Lowering, node: fx.Node) -> Value:
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
        return m.matrix(arguments(weight)[0])
    return m.value(weight)  # type: ignore[no-any-return]
