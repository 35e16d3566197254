"""Routing: select the experts of each token, and combine the results of the experts.

route scores -> experts of each token, and their shares group the places (token, slot), sorted by
expert combine the weighted sum over the slots of a token
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    PrimFunc,
    alloc_local,
    bind,
    broadcast,
    build,
    maybe_parallel,
    store,
    token_count,
    vector,
)


def route(
    experts: int,
    top_k: int,
    normalize: bool,
    scale: float,
    tokens: int | None,
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PrimFunc:
    """Select `k` experts for each token. Inputs: scores and choice float32 `[T, E]`. Results:
    experts int32 and shares float32 `[T, k]`."""
    count = token_count(tokens)
    parameters = [
        ("scores", (count, experts), "float32"),
        ("choice", (count, experts), "float32"),
        ("chosen", (count, top_k), "int32"),
        ("shares", (count, top_k), "float32"),
    ]

    def body(scores: Buffer, choice: Buffer, expert_ids: Buffer, shares: Buffer) -> None:
        with scope(), T.serial(0, count) as token:
            selected = alloc_local(experts, "int32")
            with T.serial(0, experts) as expert:
                store(selected, tirx.const(0, "int32"), expert)
            score_sum = alloc_local(1, "float32")
            store(score_sum, tirx.const(0.0, "float32"), 0)
            for slot in range(top_k):
                best = alloc_local(1, "int32")
                store(best, tirx.const(-1, "int32"), 0)
                with T.serial(0, experts) as expert:
                    best_choice = choice[token, tirx.max(best[0], 0)]
                    better = tirx.Or(best[0] < 0, choice[token, expert] > best_choice)
                    with T.If(tirx.And(selected[expert] == 0, better)), T.Then():
                        store(best, expert, 0)
                store(selected, tirx.const(1, "int32"), best[0])
                store(expert_ids, best[0], token, slot)
                store(score_sum, score_sum[0] + scores[token, best[0]], 0)
            for slot in range(top_k):
                share = scores[token, expert_ids[token, slot]]
                if normalize:
                    share = share / (score_sum[0] + tirx.const(1e-6, "float32"))
                store(shares, share * tirx.const(scale, "float32"), token, slot)

    return build(parameters, body)


def group(
    experts: int,
    top_k: int,
    tokens: int | None,
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PrimFunc:
    """Sort the places `token * k + slot` of `expert_ids` int32 `[T, k]` by expert. Results: places
    int32 `[T k]`, and the first place of each expert int32 `[E + 1]`."""
    count = token_count(tokens)
    parameters = [
        ("chosen", (count, top_k), "int32"),
        ("order", (count * top_k,), "int32"),
        ("begins", (experts + 1,), "int32"),
    ]

    def body(expert_ids: Buffer, order: Buffer, begins: Buffer) -> None:
        zero, one = tirx.const(0, "int32"), tirx.const(1, "int32")
        with scope():
            next_places = alloc_local(experts, "int32")
            with T.serial(0, experts + 1) as expert:
                store(begins, zero, expert)
            with T.serial(0, count) as token, T.serial(0, top_k) as slot:
                next_expert = expert_ids[token, slot] + 1
                store(begins, begins[next_expert] + one, next_expert)
            with T.serial(0, experts) as expert:
                store(begins, begins[expert + 1] + begins[expert], expert + 1)
                store(next_places, begins[expert], expert)
            with T.serial(0, count) as token, T.serial(0, top_k) as slot:
                expert = bind(expert_ids[token, slot])
                store(order, token * top_k + slot, next_places[expert])
                store(next_places, next_places[expert] + one, expert)

    return build(parameters, body)


def combine(size: int, top_k: int, tokens: int | None) -> PrimFunc:
    """Sum the results of places `[T k, H]`, weighted by shares `[T, k]`; result `[T, H]`."""
    count = token_count(tokens)
    parameters = [
        ("shares", (count, top_k), "float32"),
        ("x", (count * top_k, size), "float32"),
        ("y", (count, size), "float32"),
    ]

    def body(shares: Buffer, x: Buffer, y: Buffer) -> None:
        with maybe_parallel(count, tokens) as token, T.serial(0, size // LANES) as block:
            column, sums = block * LANES, None
            for slot in range(top_k):
                term = vector(x, token * top_k + slot, column) * broadcast(shares[token, slot])
                sums = term if sums is None else sums + term
            store(y, sums, token, column)

    return build(parameters, body)
