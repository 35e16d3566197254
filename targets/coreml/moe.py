"""Sparse experts in an ML program, with a width for every expert.

A constant has one number format, so a layer's matrices are stacked by format: `[E', N, K]` for the
experts that share one, and a stack of its own for each of w1, w3 and w2. Two forms compute it:

chosen (one token)    for each stack, the k chosen experts' matrices are gathered by their place in
                      it, and results of experts that are not in it are masked out:
                      k products a stack instead of E.
dense (many tokens)   every expert sees every token, and the results are mixed by shares, which are
                      0 for experts that were not chosen. One product a stack.

Routing is float32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var
from torch import Tensor, fx

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.passes.pattern import arguments
from lfmc.targets.coreml.dtypes import HALF, WIDE, cast
from lfmc.targets.coreml.lower import Lowering


@dataclass(frozen=True)
class Stack:
    """Matrices `[E', N, K]` of the experts `members`, in this order."""

    members: tuple[int, ...]
    matrices: Var


@dataclass(frozen=True)
class Routing:
    """Of each token `[T, k]` the experts that were chosen, int32, and their shares, float32; of how
    many there are."""

    chosen: Var
    shares: Var
    count: int


def lower_moe(low: Lowering, node: fx.Node) -> Var:
    """`lfm.moe`: `[T, H]` of tokens through their top-k experts."""
    x, scores, choice, w1, w3, w2, top_k, normalize, scale = arguments(node)
    _, chosen = mb.topk(x=low.value(choice, WIDE), k=top_k, axis=-1, name=f"{node.name}_choice")
    low.chosen.append(chosen.name)
    picked = mb.gather_along_axis(x=low.value(scores, WIDE), indices=chosen, axis=1)
    if normalize:
        total = mb.reduce_sum(x=picked, axes=[-1], keep_dims=True)
        picked = mb.real_div(x=picked, y=mb.add(x=total, y=np.float32(1e-6)))
    if scale != 1.0:
        picked = mb.mul(x=picked, y=np.float32(scale))
    stacks = [_stacks(low, weights) for weights in (w1, w3, w2)]
    routing = Routing(chosen, picked, len(w1))
    form = _chosen if low.tokens == 1 and not low.form.dense else _dense
    return mb.identity(x=form(low.value(x, HALF), routing, stacks), name=node.name)


def _stacks(low: Lowering, weights: Sequence[fx.Node]) -> list[Stack]:
    """One matrix of each expert, stacked by number format."""
    groups: dict[Format | None, list[tuple[int, str]]] = {}
    for index, weight in enumerate(weights):
        name = low.program.tensor_behind(weight)
        planned = low.weights.format(name)
        key = planned if isinstance(planned, Format) else None
        groups.setdefault(key, []).append((index, name))
    found = []
    for number_format, held in groups.items():
        sources = tuple(name for _, name in held)
        prefix, _, suffix = sources[0].partition(".experts.")
        leaf = suffix.split(".", 1)[1].removesuffix(".weight")
        if number_format is None:
            floats = partial(_floats, low.weights, sources)
            matrices = low.constants.values(f"{prefix}.experts.{leaf}", sources, floats, "experts")
        else:
            full = f"{prefix}.experts.{leaf}.{number_format.name}"
            pieces = partial(_packed, low.weights, sources)
            matrices = low.constants.matrix(full, sources, pieces, "experts")
        found.append(Stack(tuple(index for index, _ in held), matrices))
    return found


def _floats(weights: PlannedWeights, sources: tuple[str, ...]) -> Tensor:
    return torch.stack([weights.floats((name,)) for name in sources])


def _packed(weights: PlannedWeights, sources: tuple[str, ...]) -> list[PackedTensor]:
    return [weights.packed((name,)) for name in sources]


def _chosen(x: Var, routing: Routing, stacks: Sequence[list[Stack]]) -> Var:
    """Of one token `[1, H]`: products of the chosen experts `[k]` only."""
    experts = mb.squeeze(x=routing.chosen, axes=[0])
    gate, up, down = stacks
    column = mb.expand_dims(x=mb.transpose(x=x, perm=[1, 0]), axes=[0])  # (1, H, 1)
    first, third = (_gathered(stack, experts, column, routing.count) for stack in (gate, up))
    inner = mb.mul(x=mb.silu(x=first), y=third)  # (k, I, 1)
    out = _gathered(down, experts, inner, routing.count)  # (k, H, 1)
    weight = mb.expand_dims(
        x=mb.transpose(x=cast(routing.shares, HALF), perm=[1, 0]), axes=[2]
    )  # (k, 1, 1)
    mixed = mb.reduce_sum(x=mb.mul(x=out, y=weight), axes=[0], keep_dims=False)  # (H, 1)
    return mb.transpose(x=mixed, perm=[1, 0])


def _gathered(stacks: list[Stack], experts: Var, x: Var, count: int) -> Var:
    """`W_e x` for each of `experts` `[k]`: `[k, N, 1]` of `x` `[1 or k, K, 1]`."""
    total = None
    for stack in stacks:
        places, inside = np.zeros(count, np.int32), np.zeros(count, np.float16)
        places[list(stack.members)] = np.arange(len(stack.members))
        inside[list(stack.members)] = 1
        place = mb.gather(x=places, indices=experts, axis=0)
        matrices = cast(mb.gather(x=stack.matrices, indices=place, axis=0), HALF)
        y = mb.matmul(x=matrices, y=x)
        if len(stacks) > 1:
            own = mb.reshape(x=mb.gather(x=inside, indices=experts, axis=0), shape=[-1, 1, 1])
            y = mb.mul(x=y, y=own)
        total = y if total is None else mb.add(x=total, y=y)
    return total


def _dense(x: Var, routing: Routing, stacks: Sequence[list[Stack]]) -> Var:
    """Of many tokens `[T, H]`: products of all experts, in the order of the stacks."""
    gate, up, down = stacks
    count = routing.count
    hot = mb.one_hot(
        indices=routing.chosen, one_hot_vector_size=count, axis=-1, on_value=1.0, off_value=0.0
    )
    spread = mb.mul(x=hot, y=mb.expand_dims(x=routing.shares, axes=[2]))  # (T, k, E)
    every = mb.transpose(x=mb.reduce_sum(x=spread, axes=[1], keep_dims=False), perm=[1, 0])
    columns = mb.expand_dims(x=mb.transpose(x=x, perm=[1, 0]), axes=[0])  # (1, H, T)

    def all_experts(stack: list[Stack]) -> Any:
        parts = [mb.matmul(x=cast(s.matrices, HALF), y=columns) for s in stack]
        return _in_order(parts, [s.members for s in stack])

    inner = mb.mul(x=mb.silu(x=all_experts(gate)), y=all_experts(up))  # (E, I, T)
    weighted = mb.mul(x=inner, y=cast(mb.expand_dims(x=every, axes=[1]), HALF))
    total = None
    for stack in down:
        own = weighted
        if len(stack.members) < count:
            own = mb.gather(x=weighted, indices=np.array(stack.members, np.int32), axis=0)
        y = mb.reduce_sum(
            x=mb.matmul(x=cast(stack.matrices, HALF), y=own), axes=[0], keep_dims=False
        )
        total = y if total is None else mb.add(x=total, y=y)
    return mb.transpose(x=total, perm=[1, 0])


def _in_order(parts: list[Var], members: list[tuple[int, ...]]) -> Var:
    """Parts `[E', ...]` of experts as one, expert by expert."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort([index for group in members for index in group]).astype(np.int32)
    return mb.gather(x=mb.concat(values=parts, axis=0), indices=order, axis=0)
