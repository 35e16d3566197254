"""merge-projections: matmuls of one input become one matmul.

    1. lfm.attention(linear(x, wq), linear(x, wk), linear(x, wv), ...)
    2. lfm.swiglu(linear(x, w1), linear(x, w3))
      ->  a, b, ... = split(linear(x, [wa; wb; ...]))

Which weights belong together is read off the graph: they share an input and meet in one operator.
Their tensors keep their own rows in the plan and share a format.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch

from lfmc.graph.program import Program, Weight
from lfmc.passes.pattern import Op, Var, match

_LINEAR = Op("aten.linear", Var("x"), Var("weight"))
_MEETINGS = {"lfm.attention": 3, "lfm.swiglu": 2}


@dataclass(frozen=True)
class MergeProjections:
    name: ClassVar[str] = "merge-projections"
    tolerance: ClassVar[float] = 1e-5
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for name, count in _MEETINGS.items():
            for node in list(program.nodes(name)):
                changed += _merge(program, list(node.args[:count]))
        return changed


def _merge(program: Program, linears: list[Any]) -> int:
    found = [match(_LINEAR, node) for node in linears]
    matches = [f for f in found if f is not None]
    if len(matches) != len(linears) or len({f["x"] for f in matches}) != 1:
        return 0
    if len(set(linears)) != len(linears):
        return 0
    if any(
        f.node("weight").op != "get_attr" or len(n.users) != 1
        for f, n in zip(matches, linears, strict=True)
    ):
        return 0
    weights = [f.node("weight") for f in matches]
    sizes = [w.meta["val"].shape[0] for w in weights]
    sources = [s for w in weights for s in program.weights[str(w.target)].sources]
    stacked = weights[0].meta["val"].new_empty(sum(sizes), weights[0].meta["val"].shape[1])
    merged = program.add_weight(_merged_name(sources), Weight(tuple(sources)), stacked)
    first = min(linears, key=list(program.graph.nodes).index)
    with program.graph.inserting_before(first):
        product = program.call(torch.ops.aten.linear.default, matches[0]["x"], merged)
        parts = program.call(torch.ops.aten.split_with_sizes.default, product, sizes, -1)
        pieces = [program.call(operator.getitem, parts, i) for i in range(len(sizes))]
    for old, new in zip(linears, pieces, strict=True):
        program.replace(old, new)
    return 1


def _merged_name(sources: list[str]) -> str:
    """`...self_attn.q_proj.weight`, `k_proj`, `v_proj` -> `...self_attn.q_proj+k_proj+v_proj`."""
    paths = [source.removesuffix(".weight").split(".") for source in sources]
    shared = list(takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False)))
    leaves = "+".join(".".join(path[len(shared) :]) for path in paths)
    return ".".join([*paths[0][: len(shared)], leaves, "weight"])
