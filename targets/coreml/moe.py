"""Sparse experts in an ML program, with a bit width per expert.

A constant has one number format, so the matrices of a layer are stacked by format: `[E', N, K]` for
the experts that share a format, with separate stacks for w1, w3 and w2. There are two ways to
compute the layer:

chosen (one token)    gathers the matrices of the k chosen experts by their index in each stack, and
                      masks out the results of experts that are not in the stack. It computes k
                      products per stack instead of E.
dense (many tokens)   multiplies every token with every expert, and mixes the results by shares,
                      which are 0 for experts that were not chosen. It computes one product per
                      stack.

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
    """The matrices `[E', N, K]` of the experts `members`, in this order."""

    members: tuple[int, ...]
    matrices: Var


@dataclass(frozen=True)
class Routing:
    """The chosen experts of each token, int32 `[T, k]`, and their shares, float32 `[T, k]`.

    `num_experts` is the number of all experts of the layer.
    """

    experts: Var
    shares: Var
    num_experts: int


def lower_moe(lowering: Lowering, node: fx.Node) -> Var:
    """Lower `lfm.moe`: send tokens `[T, H]` through their top-k experts."""
    x, scores, choice, w1, w3, w2, top_k, normalize, scale = arguments(node)
    _, experts = mb.topk(
        x=lowering.value(choice, WIDE), k=top_k, axis=-1, name=f"{node.name}_choice"
    )
    lowering.choice_names.append(experts.name)
    shares = mb.gather_along_axis(x=lowering.value(scores, WIDE), indices=experts, axis=1)
    if normalize:
        total = mb.reduce_sum(x=shares, axes=[-1], keep_dims=True)
        shares = mb.real_div(x=shares, y=mb.add(x=total, y=np.float32(1e-6)))
    if scale != 1.0:
        shares = mb.mul(x=shares, y=np.float32(scale))
    stacks = [_stacks(lowering, weights) for weights in (w1, w3, w2)]
    routing = Routing(experts, shares, len(w1))
    use_chosen = lowering.tokens == 1 and not lowering.options.dense_decode
    compute = _chosen if use_chosen else _dense
    return mb.identity(x=compute(lowering.value(x, HALF), routing, stacks), name=node.name)


def _stacks(lowering: Lowering, weights: Sequence[fx.Node]) -> list[Stack]:
    """Stack one matrix of each expert by number format."""
    groups: dict[Format | None, list[tuple[int, str]]] = {}
    for index, weight in enumerate(weights):
        name = lowering.program.tensor_behind(weight)
        planned = lowering.weights.format(name)
        key = planned if isinstance(planned, Format) else None
        groups.setdefault(key, []).append((index, name))
    stacks = []
    for number_format, members in groups.items():
        sources = tuple(name for _, name in members)
        prefix, _, suffix = sources[0].partition(".experts.")
        leaf = suffix.split(".", 1)[1].removesuffix(".weight")
        if number_format is None:
            floats = partial(_floats, lowering.weights, sources)
            matrices = lowering.constants.values(
                f"{prefix}.experts.{leaf}", sources, floats, "experts"
            )
        else:
            full_name = f"{prefix}.experts.{leaf}.{number_format.name}"
            pieces = partial(_packed, lowering.weights, sources)
            matrices = lowering.constants.matrix(full_name, sources, pieces, "experts")
        stacks.append(Stack(tuple(index for index, _ in members), matrices))
    return stacks


def _floats(weights: PlannedWeights, sources: tuple[str, ...]) -> Tensor:
    return torch.stack([weights.floats((name,)) for name in sources])


def _packed(weights: PlannedWeights, sources: tuple[str, ...]) -> list[PackedTensor]:
    return [weights.packed((name,)) for name in sources]


def _chosen(x: Var, routing: Routing, stacks: Sequence[list[Stack]]) -> Var:
    """Multiply one token `[1, H]` with the chosen experts `[k]` only."""
    experts = mb.squeeze(x=routing.experts, axes=[0])
    gate, up, down = stacks
    column = mb.expand_dims(x=mb.transpose(x=x, perm=[1, 0]), axes=[0])  # (1, H, 1)
    gate_out, up_out = (
        _multiply_chosen(stack, experts, column, routing.num_experts) for stack in (gate, up)
    )
    inner = mb.mul(x=mb.silu(x=gate_out), y=up_out)  # (k, I, 1)
    out = _multiply_chosen(down, experts, inner, routing.num_experts)  # (k, H, 1)
    weight = mb.expand_dims(
        x=mb.transpose(x=cast(routing.shares, HALF), perm=[1, 0]), axes=[2]
    )  # (k, 1, 1)
    mixed = mb.reduce_sum(x=mb.mul(x=out, y=weight), axes=[0], keep_dims=False)  # (H, 1)
    return mb.transpose(x=mixed, perm=[1, 0])


def _multiply_chosen(stacks: list[Stack], experts: Var, x: Var, num_experts: int) -> Var:
    """Return `W_e x`, `[k, N, 1]`, for each of `experts` `[k]` and `x` `[1 or k, K, 1]`."""
    total = None
    for stack in stacks:
        positions = np.zeros(num_experts, np.int32)
        is_member = np.zeros(num_experts, np.float16)
        positions[list(stack.members)] = np.arange(len(stack.members))
        is_member[list(stack.members)] = 1
        position = mb.gather(x=positions, indices=experts, axis=0)
        matrices = cast(mb.gather(x=stack.matrices, indices=position, axis=0), HALF)
        y = mb.matmul(x=matrices, y=x)
        if len(stacks) > 1:
            mask = mb.reshape(x=mb.gather(x=is_member, indices=experts, axis=0), shape=[-1, 1, 1])
            y = mb.mul(x=y, y=mask)
        total = y if total is None else mb.add(x=total, y=y)
    return total


def _dense(x: Var, routing: Routing, stacks: Sequence[list[Stack]]) -> Var:
    """Multiply many tokens `[T, H]` with all experts, in the order of the stacks."""
    gate, up, down = stacks
    num_experts = routing.num_experts
    one_hot = mb.one_hot(
        indices=routing.experts,
        one_hot_vector_size=num_experts,
        axis=-1,
        on_value=1.0,
        off_value=0.0,
    )
    shares_by_slot = mb.mul(x=one_hot, y=mb.expand_dims(x=routing.shares, axes=[2]))  # (T, k, E)
    shares = mb.transpose(x=mb.reduce_sum(x=shares_by_slot, axes=[1], keep_dims=False), perm=[1, 0])
    columns = mb.expand_dims(x=mb.transpose(x=x, perm=[1, 0]), axes=[0])  # (1, H, T)

    def all_experts(stack: list[Stack]) -> Any:
        parts = [mb.matmul(x=cast(s.matrices, HALF), y=columns) for s in stack]
        return _in_order(parts, [s.members for s in stack])

    inner = mb.mul(x=mb.silu(x=all_experts(gate)), y=all_experts(up))  # (E, I, T)
    weighted = mb.mul(x=inner, y=cast(mb.expand_dims(x=shares, axes=[1]), HALF))
    result = None
    for stack in down:
        stack_input = weighted
        if len(stack.members) < num_experts:
            stack_input = mb.gather(x=weighted, indices=np.array(stack.members, np.int32), axis=0)
        y = mb.reduce_sum(
            x=mb.matmul(x=cast(stack.matrices, HALF), y=stack_input), axes=[0], keep_dims=False
        )
        result = y if result is None else mb.add(x=result, y=y)
    return mb.transpose(x=result, perm=[1, 0])


def _in_order(parts: list[Var], members: list[tuple[int, ...]]) -> Var:
    """Join the parts `[E', ...]` of the stacks in the order of the experts."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort([index for group in members for index in group]).astype(np.int32)
    return mb.gather(x=mb.concat(values=parts, axis=0), indices=order, axis=0)
