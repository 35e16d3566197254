"""Sparse experts in Relax: those of the same formats go through one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from lfmc.calib_free.grid.formats import Format
from lfmc.errors import UnsupportedError
from lfmc.passes.pattern import arguments
from lfmc.targets.tvm.kernels.moe import Stack
from lfmc.targets.tvm.relax_function import Value, Walk, whole_value


def lower_moe(m: Walk, node: fx.Node) -> Value:
    x, scores, choice, w1, w3, w2, top_k, normalize, scale = arguments(node)
    experts = [tuple(map(m.program.tensor_behind, own)) for own in zip(w1, w3, w2, strict=True)]
    tokens, count = m.kind.tokens, len(experts)
    given = [m.whole(m.value(arg)).var for arg in (scores, choice)]
    few, places = (m.length, top_k), m.length * top_k
    chosen, shares = m.call(
        m.kernels.route,
        count,
        top_k,
        normalize,
        scale,
        tokens,
        given=given,
        results=[few, few],
        dtypes={0: "int32"},
    )
    order, begins = m.call(
        m.kernels.group,
        count,
        top_k,
        tokens,
        given=[chosen],
        results=[(places,), (count + 1,)],
        dtypes={0: "int32", 1: "int32"},
    )
    kinds = [
        (members, tuple(zip(*names, strict=True)))
        for members, names in m.constants.expert_kinds(experts)
    ]
    inner = _products(
        m, node, m.kernels.gate_up, m.value(x), m.length, kinds, slice(2), order, begins
    )
    found = _products(m, node, m.kernels.down, inner, places, kinds, slice(2, 3), order, begins)
    size = found.columns.size
    return m.one(m.kernels.combine, size, top_k, tokens, given=[shares, found.var], size=size)


# Experts whose matrices have the same formats: where each expert of the layer is among them, and
# names of their w1, w3 and w2.
Experts = tuple[list[int], tuple[tuple[str, ...], ...]]


def _products(
    m: Walk,
    node: fx.Node,
    make: Callable[..., Any],
    value: Value,
    rows: Any,
    kinds: Sequence[Experts],
    which: slice,
    order: Any,
    begins: Any,
) -> Value:
    """`gate_up` of w1 and w3, or `down` of w2, for all kinds of experts into one value; `rows` are
    those of what is multiplied."""
    top_k = int(arguments(node)[6])
    size = m.constants.shape(kinds[0][1][which][0][0])[0]
    made = m.empty(m.length * top_k, size)
    for members, names in kinds:
        stacks, parts = zip(*map(m.constants.stack, names[which]), strict=True)
        _require_alike(stacks, names[which][0][0])
        group = stacks[0].group if isinstance(stacks[0], Format) else None
        given = [m.whole(value).var] if group is None else m.activations(value, group, rows)
        table = relax.const(np.array(members, np.int32))
        made = m.write(
            make,
            *stacks,
            m.library.device,
            m.product_tokens,
            given=[*given, order, begins, table, *m.param(*(p for own in parts for p in own))],
            into=made,
            node=node,
            top_k=top_k,
            exact=m.kind.exact,
        )
    return whole_value(made, size)


def _require_alike(stacks: Sequence[Stack], name: str) -> None:
    """An expert's w1 and w3 are given the same activations."""
    groups = {stack.group if isinstance(stack, Format) else 0 for stack in stacks}
    if len(groups) > 1:
        raise UnsupportedError(
            "an expert's w1 and w3 have groups of different sizes, or only one of them has any",
            where=name,
            todo="give both the same group; widths may differ",
        )
