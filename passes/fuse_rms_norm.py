"""fuse-rms-norm: root mean square normalization, and the residual sum before it.

1. mul(weight, mul(x, rsqrt(add(mean(pow(x, 2), [-1], True), eps))))
     ->  lfm.rms_norm(x, weight, eps)

2. s = add(residual, x); lfm.rms_norm(s, weight, eps)          (s may have other uses)
     ->  y, s = lfm.add_rms_norm(x, residual, weight, eps)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lfmc.graph.program import Program
from lfmc.passes.pattern import Op, Var, match_pattern

_X = Var("x")
_MEAN = Op("aten.mean", Op("aten.pow", _X, 2), [-1], True)
_NORM = Op(
    "aten.mul",
    Var("weight"),
    Op("aten.mul", _X, Op("aten.rsqrt", Op("aten.add", _MEAN, Var("eps")))),
)


@dataclass(frozen=True)
class FuseRmsNorm:
    name: ClassVar[str] = "fuse-rms-norm"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.nodes("aten.mul")):
            match = match_pattern(_NORM, node)
            if match is None or not isinstance(match["eps"], float):
                continue
            if _is_vector(match["weight"]) and match.is_private():
                with program.graph.inserting_before(node):  # 1
                    norm = program.call(
                        torch.ops.lfm.rms_norm.default,
                        match["x"],
                        match["weight"],
                        match["eps"],
                    )
                program.replace(node, norm)
                changed += 1
        for norm in list(program.nodes("lfm.rms_norm")):
            _fuse_residual(program, norm)  # 2
        return changed


def _is_vector(weight: object) -> bool:
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    return value is not None and value.dim() == 1


def _fuse_residual(program: Program, norm: fx.Node) -> None:
    total, weight, eps = norm.args
    match = match_pattern(Op("aten.add", Var("residual"), Var("x")), total)
    if match is None or not isinstance(total, fx.Node):
        return
    residual, x = match["residual"], match["x"]
    if not (isinstance(residual, fx.Node) and isinstance(x, fx.Node)):
        return
    if residual.meta["val"].shape != x.meta["val"].shape:
        return
    if sum(user.target is norm.target for user in total.users) > 1:
        return  # two norms read this sum, so it is fused into neither
    with program.graph.inserting_before(total):
        result = program.call(torch.ops.lfm.add_rms_norm.default, x, residual, weight, eps)
        new_norm = program.call(operator.getitem, result, 0)
        new_total = program.call(operator.getitem, result, 1)
    program.replace(norm, new_norm)
    program.replace(total, new_total)
