"""fuse-swiglu: `mul(silu(gate), up)`  ->  `lfm.swiglu(gate, up)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lfmc.graph.program import Program
from lfmc.passes.pattern import Op, Var, match_pattern

_PATTERN = Op("aten.mul", Op("aten.silu", Var("gate")), Var("up"))


@dataclass(frozen=True)
class FuseSwiglu:
    name: ClassVar[str] = "fuse-swiglu"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.nodes("aten.mul")):
            match = match_pattern(_PATTERN, node)
            if not match or not isinstance(match["up"], fx.Node) or not match.is_private():
                continue
            if match.node("gate").meta["val"].shape != match.node("up").meta["val"].shape:
                continue
            with program.graph.inserting_before(node):
                fused = program.call(torch.ops.lfm.swiglu.default, match["gate"], match["up"])
            program.replace(node, fused)
            changed += 1
        return changed
