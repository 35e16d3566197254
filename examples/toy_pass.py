"""A toy pass: `cos(cat([x, x]))` -> `cat([c, c])` with `c = cos(x)`, and the same for the sine.

The rotary embedding contains this pattern: both halves of a head rotate by the same angles, so it
is enough to compute half of the cosines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lfmc.graph.program import Program
from lfmc.passes.pattern import Op, Var, match_pattern

FUNCTIONS = {"aten.cos": torch.ops.aten.cos.default, "aten.sin": torch.ops.aten.sin.default}


@dataclass(frozen=True)
class HalveRotaryAngles:
    name: ClassVar[str] = "halve-rotary-angles"
    tolerance: ClassVar[float] = 0.0  # exact: the same function of the same numbers
    ensures: ClassVar[tuple[str, ...]] = ()  # cosines remain, of half as many numbers

    def run(self, program: Program) -> int:
        changed = 0
        for name, function in FUNCTIONS.items():
            pattern = Op(name, Op("aten.cat", [Var("x"), Var("x")], Var("dim")))
            for node in list(program.nodes(name)):
                match = match_pattern(pattern, node)
                if not match:
                    continue
                with program.graph.inserting_before(node):
                    half = program.call(function, match.node("x"))
                    result = program.call(torch.ops.aten.cat.default, [half, half], match["dim"])
                program.replace(node, result)
                changed += 1
        return changed
