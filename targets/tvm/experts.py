"""Sparse experts in Relax: one call computes all experts of the same formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from lfmc.calib_free.grid.formats import Format
from lfmc.errors import UnsupportedError
from lfmc.passes.pattern import arguments
from lfmc.targets.tvm.kernels.moe import Stack
from lfmc.targets.tvm.relax_function import FunctionBuilder, Value, full_value


def lower_moe(builder: FunctionBuilder, node: fx.Node) -> Value:
    """Lower a sparse MoE: route, group places by expert, multiply, and combine."""
    x, scores, choice, w1, w3, w2, top_k, normalize, scale = arguments(node)
    experts = [
        tuple(map(builder.program.tensor_behind, nodes)) for nodes in zip(w1, w3, w2, strict=True)
    ]
    tokens, count = builder.spec.tokens, len(experts)
    score_vars = [builder.materialize(builder.node_value(arg)).var for arg in (scores, choice)]
    shape, places = (builder.length, top_k), builder.length * top_k
    expert_ids, shares = builder.call(
        builder.kernels.route,
        count,
        top_k,
        normalize,
        scale,
        tokens,
        inputs=score_vars,
        result_shapes=[shape, shape],
        dtypes={0: "int32"},
    )
    order, begins = builder.call(
        builder.kernels.group,
        count,
        top_k,
        tokens,
        inputs=[expert_ids],
        result_shapes=[(places,), (count + 1,)],
        dtypes={0: "int32", 1: "int32"},
    )
    expert_groups = [
        (members, tuple(zip(*names, strict=True)))
        for members, names in builder.constants.group_experts_by_format(experts)
    ]
    hidden = _multiply_experts(
        builder,
        node,
        builder.kernels.gate_up,
        builder.node_value(x),
        builder.length,
        expert_groups,
        slice(2),
        order,
        begins,
    )
    outputs = _multiply_experts(
        builder,
        node,
        builder.kernels.down,
        hidden,
        places,
        expert_groups,
        slice(2, 3),
        order,
        begins,
    )
    size = outputs.columns.size
    return builder.call_single(
        builder.kernels.combine, size, top_k, tokens, inputs=[shares, outputs.var], size=size
    )


# Experts whose matrices have the same formats: for each expert of the layer its index in the group
# (-1: not in the group), and the names of the w1, w3 and w2 of the group.
ExpertGroup = tuple[list[int], tuple[tuple[str, ...], ...]]


def _multiply_experts(
    builder: FunctionBuilder,
    node: fx.Node,
    kernel_builder: Callable[..., Any],
    value: Value,
    rows: Any,
    expert_groups: Sequence[ExpertGroup],
    matrices: slice,
    order: Any,
    begins: Any,
) -> Value:
    """Call `gate_up` with w1 and w3, or `down` with w2, for all groups of experts; all groups write
    one value. `rows` is the number of rows of `value`."""
    top_k = int(arguments(node)[6])
    size = builder.constants.shape(expert_groups[0][1][matrices][0][0])[0]
    output = builder.allocate(builder.length * top_k, size)
    for members, names in expert_groups:
        stacks, parts = zip(*map(builder.constants.stack, names[matrices]), strict=True)
        _require_same_group_size(stacks, names[matrices][0][0])
        group = stacks[0].group if isinstance(stacks[0], Format) else None
        if group is None:
            activations = [builder.materialize(value).var]
        else:
            activations = builder.activations(value, group, rows)
        members_constant = relax.const(np.array(members, np.int32))
        weights = builder.parameter_vars(*chain.from_iterable(parts))
        output = builder.call_in_place(
            kernel_builder,
            *stacks,
            builder.library.device,
            builder.product_tokens,
            inputs=[*activations, order, begins, members_constant, *weights],
            output=output,
            node=node,
            top_k=top_k,
            exact=builder.spec.exact,
        )
    return full_value(output, size)


def _require_same_group_size(stacks: Sequence[Stack], name: str) -> None:
    """Raise `UnsupportedError` if w1 and w3 of an expert would need different activations."""
    groups = {stack.group if isinstance(stack, Format) else 0 for stack in stacks}
    if len(groups) > 1:
        raise UnsupportedError(
            "w1 and w3 of an expert have different group sizes",
            where=name,
            todo="give both the same group; widths may differ",
        )
