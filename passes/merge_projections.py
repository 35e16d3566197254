"""merge-projections: merges matmuls of the same input into one matmul.

    1. lfm.attention(linear(x, wq), linear(x, wk), linear(x, wv), ...)
    2. lfm.swiglu(linear(x, w1), linear(x, w3))
      ->  a, b, ... = split(linear(x, [wa; wb; ...]))

The graph determines which weights belong together: their matmuls read one input and feed one
operator. The merged tensors keep separate rows in the plan and must have the same format.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch

from lfmc.graph.program import Program, Weight
from lfmc.passes.pattern import Op, Var, match_pattern

_LINEAR = Op("aten.linear", Var("x"), Var("weight"))
_NUM_PROJECTIONS = {"lfm.attention": 3, "lfm.swiglu": 2}


@dataclass(frozen=True)
class MergeProjections:
    name: ClassVar[str] = "merge-projections"
    tolerance: ClassVar[float] = 1e-5
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for name, count in _NUM_PROJECTIONS.items():
            for node in list(program.nodes(name)):
                changed += _merge(program, list(node.args[:count]))
        return changed


def _merge(program: Program, linears: list[Any]) -> int:
    matches = [match for node in linears if (match := match_pattern(_LINEAR, node))]
    if len(matches) != len(linears) or len({match["x"] for match in matches}) != 1:
        return 0
    if len(set(linears)) != len(linears):
        return 0
    if any(
        match.node("weight").op != "get_attr" or len(linear.users) != 1
        for match, linear in zip(matches, linears, strict=True)
    ):
        return 0
    weights = [match.node("weight") for match in matches]
    sizes = [w.meta["val"].shape[0] for w in weights]
    sources = [s for w in weights for s in program.weights[str(w.target)].sources]
    stacked = weights[0].meta["val"].new_empty(sum(sizes), weights[0].meta["val"].shape[1])
    merged = program.add_weight(_merged_name(sources), Weight(tuple(sources)), stacked)
    first = min(linears, key=list(program.graph.nodes).index)
    with program.graph.inserting_before(first):
        product = program.call(torch.ops.aten.linear.default, matches[0]["x"], merged)
        split = program.call(torch.ops.aten.split_with_sizes.default, product, sizes, -1)
        outputs = [program.call(operator.getitem, split, i) for i in range(len(sizes))]
    for old, new in zip(linears, outputs, strict=True):
        program.replace(old, new)
    return 1


def _merged_name(sources: list[str]) -> str:
    """`attn.q_proj.weight`, `attn.k_proj.weight` -> `attn.q_proj+k_proj.weight`."""
    paths = [source.removesuffix(".weight").split(".") for source in sources]
    prefix = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    leaves = "+".join(".".join(path[len(prefix) :]) for path in paths)
    return ".".join([*paths[0][: len(prefix)], leaves, "weight"])
