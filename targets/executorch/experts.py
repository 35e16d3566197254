"""Steps for sparse experts: each expert runs on the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lfmc.passes.pattern import arguments
from lfmc.targets.executorch.lower import Lowering
from lfmc.targets.executorch.steps import Block, Conditional, Element, Matrix, RuntimeStep, Value


def moe(m: Lowering, node: fx.Node) -> Value:
    """Run each expert on the tokens routed to it; skip experts without tokens."""
    x_node, scores_node, choice_node, w1, w3, w2, *routing = arguments(node)
    x, scores, choice = (m.value(arg) for arg in (x_node, scores_node, choice_node))
    with m.record_steps() as steps:
        shares = _expert_shares(m, scores, choice, *routing)
        experts = shares.shape[1]
        largest = m.call("aten::amax.out", (shares, [0], False), (experts,))
        used = m.call("aten::gt.Scalar_out", (largest, 0.0), (experts,), torch.bool)
        mixed = m.call("aten::full_like.out", (x, 0.0, None), x.shape)
        for index, matrices in enumerate(zip(w1, w3, w2, strict=True)):
            with m.record_steps() as expert_steps:
                _add_expert(m, x, shares, index, matrices, mixed)
            condition = Element((), torch.bool, base=used, index=index)
            steps.append(Conditional(condition, expert_steps))
    m.recorder.steps.append(Block((x, scores, choice), (mixed,), steps))
    return mixed


def _expert_shares(
    m: Lowering, scores: Value, choice: Value, top_k: int, normalize: bool, scale: float
) -> Value:
    """Return the weight of each expert for each token, `[N, E]`: 0 if it is not chosen."""
    tokens = scores.shape[0]
    shape = (tokens, top_k)
    best_scores, expert_ids = Value(shape), Value(shape, torch.int64)
    args = (choice, top_k, -1, True, True, best_scores, expert_ids)
    topk = RuntimeStep(
        "aten::topk.values", args, ([best_scores, expert_ids],), (best_scores, expert_ids)
    )
    m.recorder.steps.append(topk)
    weights = m.call("aten::gather.out", (scores, 1, expert_ids, False), shape)
    if normalize:
        total = m.call("aten::sum.IntList_out", (weights, [-1], True, None), (tokens, 1))
        total = m.call("aten::add.Scalar_out", (total, 1e-6, 1), (tokens, 1))
        weights = m.call("aten::div.out", (weights, total), shape)
    if scale != 1:
        weights = m.call("aten::mul.Scalar_out", (weights, scale), shape)
    zeros = m.call("aten::full_like.out", (scores, 0.0, None), scores.shape)
    return m.call("aten::scatter.src_out", (zeros, 1, expert_ids, weights), scores.shape)


def _add_expert(
    m: Lowering, x: Value, shares: Value, index: int, matrices: Sequence[fx.Node], mixed: Value
) -> None:
    """Add the weighted output of one expert to the rows of its tokens in `mixed`."""
    tokens, size = x.shape
    share = m.call("aten::select_copy.int_out", (shares, 1, index), (tokens,))
    nonzero = m.call("aten::nonzero.out", (share,), (tokens, 1), torch.int64)
    rows = m.call("aten::squeeze_copy.dim_out", (nonzero, 1), (tokens,), torch.int64)
    routed = m.call("aten::index_select.out", (x, 0, rows), (tokens, size))
    weight = m.call("aten::index_select.out", (share, 0, rows), (tokens,))
    recorder = m.recorder
    w1, w3, w2 = (_expert_matrix(m, matrix) for matrix in matrices)
    y = recorder.multiply(recorder.silu(recorder.linear(routed, w1)), recorder.linear(routed, w3))
    y = recorder.multiply(recorder.linear(y, w2), recorder.reshape(weight, (tokens, 1)))
    before = m.call("aten::index_select.out", (mixed, 0, rows), (tokens, size))
    args = (mixed, (rows,), recorder.add(before, y), False)
    recorder.steps.append(RuntimeStep("aten::index_put_", args, (mixed,), (mixed,)))


def _expert_matrix(m: Lowering, weight: fx.Node) -> Matrix | Value:
    """Return an expert's matrix: n-bit if the node dequantizes codes, else float."""
    if weight.op == "call_function":
        return m.matrix(arguments(weight)[0])
    return m.value(weight)  # type: ignore[no-any-return]
