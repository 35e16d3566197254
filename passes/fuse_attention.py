"""fuse-attention: q/k norm, rotary embedding, cache write and grouped-query attention.

    q, k, v (projections' outputs)
      -> unflatten heads -> lfm.rms_norm (q, k) -> transpose -> rotate by positions (q, k)
      -> write k, v into the caches at positions
      -> softmax(q k^T / sqrt(D), masked to what each position sees) v -> flatten heads
    ->  y, keys, values = lfm.attention(q, k, v, q_norm, k_norm, inv_freq, positions, keys, values,
                                        eps, window, cache_write)

A per-head gate, where the model has one, stays outside: it reads the layer's input.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lfmc.graph.program import Program, operator_name
from lfmc.passes.pattern import ANY, Match, OneOf, Op, Var, match

_ANGLES = Op(
    "aten.mul",
    Op("aten.unsqueeze", OneOf(Op("aten.to", Var("positions"), ANY), Var("positions")), -1),
    Var("inv_freq"),
)
_TWICE = Op("aten.cat", [_ANGLES, _ANGLES], -1)
_COS, _SIN = Op("aten.cos", _TWICE), Op("aten.sin", _TWICE)


def _heads(x: str, norm: str) -> Op:
    split = Op("aten.unflatten", Var(x), -1, ANY)
    return Op("aten.transpose", Op("lfm.rms_norm", split, Var(norm), Var("eps")), 1, 2)


def _rotated(x: str, norm: str) -> Op:
    plain = _heads(x, norm)
    halves = Op("aten.chunk", plain, 2, -1)
    turned = Op(
        "aten.cat", [Op("aten.neg", Op("getitem", halves, 1)), Op("getitem", halves, 0)], -1
    )
    return Op("aten.add", Op("aten.mul", plain, _COS), Op("aten.mul", turned, _SIN))


def _written(cache: str, new: Any, bind: str) -> OneOf:
    at = Op("aten.expand", Op("aten.view", Var("positions"), [1, 1, -1, 1]), ANY)
    slots = Op("aten.unsqueeze", Op("aten.arange", ANY), 1)
    hot = Op("aten.to", Op("aten.eq", slots, Var("positions")), ANY)
    kept = Op("aten.rsub", Op("aten.view", Op("aten.sum", hot, [1]), [1, 1, -1, 1]), 1.0)
    blend = Op("aten.add", Op("aten.mul", Var(cache), kept), Op("aten.matmul", hot, new), bind=bind)
    return OneOf(
        Op("aten.index_copy", Var(cache), 2, Var("positions"), new, bind=bind),
        Op("aten.scatter", Var(cache), 2, at, new, bind=bind),
        blend,
    )


_KEYS = _written("keys", _rotated("k", "k_norm"), "new_keys")
_VALUES = _written(
    "values", Op("aten.transpose", Op("aten.unflatten", Var("v"), -1, ANY), 1, 2), "new_values"
)
_SLOTS = Op("aten.unsqueeze", Op("aten.arange", ANY), 0)
_NOW = Op("aten.unsqueeze", Var("positions"), 1)
_CAUSAL = Op("aten.le", _SLOTS, _NOW)
_RECENT = Op("aten.gt", _SLOTS, Op("aten.sub", _NOW, Var("window")))
_HIDDEN = Op("aten.bitwise_not", OneOf(Op("aten.__and__", _CAUSAL, _RECENT), _CAUSAL))
_SCORES = Op(
    "aten.mul",
    Op(
        "aten.unflatten",
        Op(
            "aten.matmul",
            Op("aten.flatten", Op("aten.unflatten", _rotated("q", "q_norm"), 1, ANY), 2, 3),
            Op("aten.transpose", _KEYS, 2, 3),
        ),
        2,
        ANY,
    ),
    Var("scale"),
)
_SHARES = Op("aten.softmax", Op("aten.masked_fill", _SCORES, _HIDDEN, -math.inf), -1)
_PATTERN = Op(
    "aten.transpose",
    Op(
        "aten.flatten",
        Op("aten.unflatten", Op("aten.matmul", Op("aten.flatten", _SHARES, 2, 3), _VALUES), 2, ANY),
        1,
        2,
    ),
    1,
    2,
)
_WRITES = {"aten.index_copy": "index_copy", "aten.scatter": "scatter", "aten.add": "one_hot"}


@dataclass(frozen=True)
class FuseAttention:
    name: ClassVar[str] = "fuse-attention"
    tolerance: ClassVar[float] = 1e-5
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.nodes("aten.transpose")):
            found = match(_PATTERN, node)
            if found and _is_standard(found):
                _replace(program, node, found)
                changed += 1
        return changed


def _is_standard(found: Match) -> bool:
    """The scale is `1 / sqrt(D)`: the operator has no other."""
    head_dim = found.node("keys").meta["val"].shape[3]
    return math.isclose(found["scale"], head_dim**-0.5, rel_tol=1e-9)


def _replace(program: Program, node: fx.Node, found: Match) -> None:
    new_keys, new_values = found.node("new_keys"), found.node("new_values")
    with program.graph.inserting_before(node):
        fused = program.call(
            torch.ops.lfm.attention.default,
            *(found[x] for x in ("q", "k", "v", "q_norm", "k_norm", "inv_freq")),
            *(found[x] for x in ("positions", "keys", "values", "eps")),
            found.values.get("window", 0),
            _WRITES[operator_name(new_keys)],
        )
        results = [program.call(operator.getitem, fused, index) for index in range(3)]
    for old, new in zip((node, new_keys, new_values), results, strict=True):
        program.replace(old, new)
