"""fuse-attention: q/k norm, rotary embedding, cache write and grouped-query attention.

    q, k, v (outputs of the projections)
      -> unflatten heads -> lfm.rms_norm (q, k) -> transpose -> rotate by positions (q, k)
      -> write k, v into the caches at positions
      -> softmax(q k^T / sqrt(D), masked causally and by the window) v -> flatten heads
    ->  y, keys, values = lfm.attention(q, k, v, q_norm, k_norm, inv_freq, positions, keys, values,
                                        eps, window, cache_write)

If the model has a gate per head, the gate stays outside, because it reads the input of the layer.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lfmc.graph.program import Program, operator_name
from lfmc.passes.pattern import ANY, Match, OneOf, Op, Var, match_pattern

_ANGLES = Op(
    "aten.mul",
    Op("aten.unsqueeze", OneOf(Op("aten.to", Var("positions"), ANY), Var("positions")), -1),
    Var("inv_freq"),
)
_ANGLES_OF_BOTH_HALVES = Op("aten.cat", [_ANGLES, _ANGLES], -1)
_COS, _SIN = Op("aten.cos", _ANGLES_OF_BOTH_HALVES), Op("aten.sin", _ANGLES_OF_BOTH_HALVES)


def _normalize_heads(x: str, norm: str) -> Op:
    split = Op("aten.unflatten", Var(x), -1, ANY)
    return Op("aten.transpose", Op("lfm.rms_norm", split, Var(norm), Var("eps")), 1, 2)


def _rotate(x: str, norm: str) -> Op:
    heads = _normalize_heads(x, norm)
    halves = Op("aten.chunk", heads, 2, -1)
    swapped = Op(
        "aten.cat", [Op("aten.neg", Op("getitem", halves, 1)), Op("getitem", halves, 0)], -1
    )
    return Op("aten.add", Op("aten.mul", heads, _COS), Op("aten.mul", swapped, _SIN))


def _write_cache(cache: str, new: Any, bind: str) -> OneOf:
    index = Op("aten.expand", Op("aten.view", Var("positions"), [1, 1, -1, 1]), ANY)
    slots = Op("aten.unsqueeze", Op("aten.arange", ANY), 1)
    one_hot = Op("aten.to", Op("aten.eq", slots, Var("positions")), ANY)
    keep = Op("aten.rsub", Op("aten.view", Op("aten.sum", one_hot, [1]), [1, 1, -1, 1]), 1.0)
    blend = Op(
        "aten.add", Op("aten.mul", Var(cache), keep), Op("aten.matmul", one_hot, new), bind=bind
    )
    return OneOf(
        Op("aten.index_copy", Var(cache), 2, Var("positions"), new, bind=bind),
        Op("aten.scatter", Var(cache), 2, index, new, bind=bind),
        blend,
    )


_KEYS = _write_cache("keys", _rotate("k", "k_norm"), "new_keys")
_VALUES = _write_cache(
    "values", Op("aten.transpose", Op("aten.unflatten", Var("v"), -1, ANY), 1, 2), "new_values"
)
_SLOTS = Op("aten.unsqueeze", Op("aten.arange", ANY), 0)
_QUERY_POSITIONS = Op("aten.unsqueeze", Var("positions"), 1)
_CAUSAL = Op("aten.le", _SLOTS, _QUERY_POSITIONS)
_IN_WINDOW = Op("aten.gt", _SLOTS, Op("aten.sub", _QUERY_POSITIONS, Var("window")))
_MASKED = Op("aten.bitwise_not", OneOf(Op("aten.__and__", _CAUSAL, _IN_WINDOW), _CAUSAL))
_SCORES = Op(
    "aten.mul",
    Op(
        "aten.unflatten",
        Op(
            "aten.matmul",
            Op("aten.flatten", Op("aten.unflatten", _rotate("q", "q_norm"), 1, ANY), 2, 3),
            Op("aten.transpose", _KEYS, 2, 3),
        ),
        2,
        ANY,
    ),
    Var("scale"),
)
_PROBABILITIES = Op("aten.softmax", Op("aten.masked_fill", _SCORES, _MASKED, -math.inf), -1)
_PATTERN = Op(
    "aten.transpose",
    Op(
        "aten.flatten",
        Op(
            "aten.unflatten",
            Op("aten.matmul", Op("aten.flatten", _PROBABILITIES, 2, 3), _VALUES),
            2,
            ANY,
        ),
        1,
        2,
    ),
    1,
    2,
)
_CACHE_WRITES = {"aten.index_copy": "index_copy", "aten.scatter": "scatter", "aten.add": "one_hot"}


@dataclass(frozen=True)
class FuseAttention:
    name: ClassVar[str] = "fuse-attention"
    tolerance: ClassVar[float] = 1e-5
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.nodes("aten.transpose")):
            match = match_pattern(_PATTERN, node)
            if match and _is_standard(match):
                _replace(program, node, match)
                changed += 1
        return changed


def _is_standard(match: Match) -> bool:
    """Return whether the scale is `1 / sqrt(D)`, the only one that `lfm.attention` supports."""
    head_dim = match.node("keys").meta["val"].shape[3]
    return math.isclose(match["scale"], head_dim**-0.5, rel_tol=1e-9)


def _replace(program: Program, node: fx.Node, match: Match) -> None:
    new_keys, new_values = match.node("new_keys"), match.node("new_values")
    with program.graph.inserting_before(node):
        fused = program.call(
            torch.ops.lfm.attention.default,
            *(match[x] for x in ("q", "k", "v", "q_norm", "k_norm", "inv_freq")),
            *(match[x] for x in ("positions", "keys", "values", "eps")),
            match.values.get("window", 0),
            _CACHE_WRITES[operator_name(new_keys)],
        )
        results = [program.call(operator.getitem, fused, index) for index in range(3)]
    for old, new in zip((node, new_keys, new_values), results, strict=True):
        program.replace(old, new)
