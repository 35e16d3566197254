"""Which experts a token goes to, and what comes back from them.

route      scores -> experts of each token, and what they count for
group      the same places (token, slot), sorted by expert
combine    the sum over a token's slots
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
    bind,
    build,
    local,
    put,
    side_by_side,
    tokens_of,
    vector,
    wide,
)


def route(
    experts: int,
    top_k: int,
    normalize: bool,
    scale: float,
    tokens: int | None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PrimFunc:
    """Scores and choice float32 `[T, E]`; results experts int32 and shares float32 `[T, k]`."""
    count = tokens_of(tokens)
    parameters = [
        ("scores", (count, experts), "float32"),
        ("choice", (count, experts), "float32"),
        ("chosen", (count, top_k), "int32"),
        ("shares", (count, top_k), "float32"),
    ]

    def body(scores: Buffer, choice: Buffer, chosen: Buffer, shares: Buffer) -> None:
        with around(), T.serial(0, count) as token:
            taken = local(experts, "int32")
            with T.serial(0, experts) as expert:
                put(taken, tirx.const(0, "int32"), expert)
            whole = local(1, "float32")
            put(whole, tirx.const(0.0, "float32"), 0)
            for slot in range(top_k):
                best = local(1, "int32")
                put(best, tirx.const(-1, "int32"), 0)
                with T.serial(0, experts) as expert:
                    rival = choice[token, tirx.max(best[0], 0)]
                    better = tirx.Or(best[0] < 0, choice[token, expert] > rival)
                    with T.If(tirx.And(taken[expert] == 0, better)), T.Then():
                        put(best, expert, 0)
                put(taken, tirx.const(1, "int32"), best[0])
                put(chosen, best[0], token, slot)
                put(whole, whole[0] + scores[token, best[0]], 0)
            for slot in range(top_k):
                share = scores[token, chosen[token, slot]]
                if normalize:
                    share = share / (whole[0] + tirx.const(1e-6, "float32"))
                put(shares, share * tirx.const(scale, "float32"), token, slot)

    return build(parameters, body)


def group(
    experts: int,
    top_k: int,
    tokens: int | None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> PrimFunc:
    """Places `token * k + slot` sorted by expert, int32 `[T k]`, and where each expert's begin,
    int32 `[E + 1]`, of `chosen` int32 `[T, k]`."""
    count = tokens_of(tokens)
    parameters = [
        ("chosen", (count, top_k), "int32"),
        ("order", (count * top_k,), "int32"),
        ("begins", (experts + 1,), "int32"),
    ]

    def body(chosen: Buffer, order: Buffer, begins: Buffer) -> None:
        zero, one = tirx.const(0, "int32"), tirx.const(1, "int32")
        with around():
            free = local(experts, "int32")
            with T.serial(0, experts + 1) as expert:
                put(begins, zero, expert)
            with T.serial(0, count) as token, T.serial(0, top_k) as slot:
                behind = chosen[token, slot] + 1
                put(begins, begins[behind] + one, behind)
            with T.serial(0, experts) as expert:
                put(begins, begins[expert + 1] + begins[expert], expert + 1)
                put(free, begins[expert], expert)
            with T.serial(0, count) as token, T.serial(0, top_k) as slot:
                own = bind(chosen[token, slot])
                put(order, token * top_k + slot, free[own])
                put(free, free[own] + one, own)

    return build(parameters, body)


def combine(size: int, top_k: int, tokens: int | None) -> PrimFunc:
    """Shares `[T, k]` and results of places `[T k, H]`; result `[T, H]`."""
    count = tokens_of(tokens)
    parameters = [
        ("shares", (count, top_k), "float32"),
        ("x", (count * top_k, size), "float32"),
        ("y", (count, size), "float32"),
    ]

    def body(shares: Buffer, x: Buffer, y: Buffer) -> None:
        with side_by_side(count, tokens) as token, T.serial(0, size // LANES) as block:
            at, whole = block * LANES, None
            for slot in range(top_k):
                part = vector(x, token * top_k + slot, at) * wide(shares[token, slot])
                whole = part if whole is None else whole + part
            put(y, whole, token, at)

    return build(parameters, body)
