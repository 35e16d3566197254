"""A toy pass: `cos(cat([x, x]))` -> `cat([c, c])` with `c = cos(x)`, and likewise the sine.

Rotary angles are made that way: both halves of a head turn by the same angles, so half of the
cosines need not be computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lfmc.graph.program import Program
from lfmc.passes.pattern import Op, Var, match

FUNCTIONS = {"aten.cos": torch.ops.aten.cos.default, "aten.sin": torch.ops.aten.sin.default}


@dataclass(frozen=True)
class HalveRotaryAngles:
    name: ClassVar[str] = "halve-rotary-angles"
    tolerance: ClassVar[float] = 0.0  # the same function of the same numbers
    ensures: ClassVar[tuple[str, ...]] = ()  # cosines remain: of half as many numbers

    def run(self, program: Program) -> int:
        changed = 0
        for name, function in FUNCTIONS.items():
            pattern = Op(name, Op("aten.cat", [Var("x"), Var("x")], Var("dim")))
            for node in list(program.nodes(name)):
                found = match(pattern, node)
                if not found:
                    continue
                with program.graph.inserting_before(node):
                    half = program.call(function, found.node("x"))
                    both = program.call(torch.ops.aten.cat.default, [half, half], found["dim"])
                program.replace(node, both)
                changed += 1
        return changed
