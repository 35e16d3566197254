"""quantize-linears: matmuls and experts in the formats of a plan.

    1. linear(x, W, bias)        ->  lfm.linear_nbits(x, codes, scales, zeros, bias, ...)
    2. lfm.moe(x, ..., [W...])   ->  lfm.moe(x, ..., [lfm.dequantize(codes, scales, zeros, ...)...])

Weights that the plan keeps float do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lfmc.graph.program import Program
from lfmc.passes.pattern import arguments
from lfmc.passes.quantize import Formats, add_parts, planned_format


@dataclass(frozen=True)
class QuantizeLinears:
    """`formats` maps the name of every tensor of the checkpoint to its format."""

    formats: Formats
    name: ClassVar[str] = "quantize-linears"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.nodes("aten.linear")):
            x, weight, bias = arguments(node)
            number_format = planned_format(program, weight, self.formats)
            if number_format is None:
                continue
            columns = weight.meta["val"].shape[1]
            parts = add_parts(program, weight, number_format)
            tail = (bias, number_format.bits, number_format.columns_per_group(columns), columns)
            with program.graph.inserting_before(node):  # 1
                fused = program.call(torch.ops.lfm.linear_nbits.default, x, *parts, *tail)
            program.replace(node, fused)
            changed += 1
        for node in list(program.nodes("lfm.moe")):
            changed += self._quantize_experts(program, node)
        return changed

    def _quantize_experts(self, program: Program, node: fx.Node) -> int:
        changed = 0
        new_lists = []
        for weights in arguments(node)[3:6]:
            new_weights = []
            for weight in weights:
                number_format = planned_format(program, weight, self.formats)
                if number_format is not None:
                    parts = add_parts(program, weight, number_format)
                    columns = weight.meta["val"].shape[1]
                    tail = (number_format.bits, number_format.columns_per_group(columns), columns)
                    with program.graph.inserting_before(node):  # 2
                        weight = program.call(torch.ops.lfm.dequantize.default, *parts, *tail)
                    changed += 1
                new_weights.append(weight)
            new_lists.append(new_weights)
        node.args = (*node.args[:3], *new_lists, *node.args[6:])
        return changed
