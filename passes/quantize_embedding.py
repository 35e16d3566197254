"""quantize-embedding: `embedding(W, ids)`  ->  `lfm.embedding_nbits(ids, codes, scales, ...)`.

A tied head reads the same codes, because head and embedding are one tensor with one format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lfmc.graph.program import Program
from lfmc.passes.pattern import arguments
from lfmc.passes.quantize import Formats, add_parts, planned_format


@dataclass(frozen=True)
class QuantizeEmbedding:
    """`formats` maps the name of every tensor of the checkpoint to its format."""

    formats: Formats
    name: ClassVar[str] = "quantize-embedding"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        changed = 0
        for node in list(program.nodes("aten.embedding")):
            table, ids = arguments(node)[:2]
            number_format = planned_format(program, table, self.formats)
            if number_format is None:
                continue
            columns = table.meta["val"].shape[1]
            parts = add_parts(program, table, number_format)
            tail = (number_format.bits, number_format.columns_per_group(columns), columns)
            with program.graph.inserting_before(node):
                fused = program.call(torch.ops.lfm.embedding_nbits.default, ids, *parts, *tail)
            program.replace(node, fused)
            changed += 1
        return changed
