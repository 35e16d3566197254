"""Read the constants of a bound program by their checkpoint names, for the torch reference."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lfmc.graph.program import Program
from lfmc.targets.npu.host import Embed

LINEARS = ("aten.linear", "lfm.linear_nbits")
# The position of an operator's codes; its scales and zero points follow.
CODES_POSITION = {"lfm.linear_nbits": 1, "lfm.embedding_nbits": 1, "lfm.dequantize": 0}


class BoundConstants:
    """Constants of a program by checkpoint tensor; matrices are `[K, N]`.

    Matrices that a pass merged are split again.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    def __call__(self, sources: tuple[str, ...]) -> Tensor:
        (name,) = sources
        return self._values[name]

    def embedding(self, name: str) -> Embed:
        """Return a function that looks up tokens in a table."""
        return lambda ids: self((name,)).T[ids]

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        rows_of_merged = self._rows_of_merged()
        for name, weight in self._program.weights.items():
            if weight.part not in ("values", "codes"):
                continue
            merged = self._dequantized[name] if weight.part == "codes" else self._buffer(name)
            sizes = rows_of_merged.get(weight.sources, [len(merged)])
            for source, value in zip(weight.sources, merged.split(sizes), strict=True):
                values[source] = value.T.contiguous() if value.ndim == 2 else value
        return values

    def _buffer(self, name: str) -> Tensor:
        return self._program.constant(name)

    @cached_property
    def _dequantized(self) -> dict[str, Tensor]:
        """Dequantized matrices, by the names of their codes."""
        matrices: dict[str, Tensor] = {}
        for name, first in CODES_POSITION.items():
            for node in self._program.nodes(name):
                operands: Any = node.args[first : first + 3]
                parts = [
                    None if operand is None else self._buffer(operand.target)
                    for operand in operands
                ]
                numbers: Any = node.args[-3:]  # bits, group, columns
                matrices[operands[0].target] = torch.ops.lfm.dequantize(*parts, *numbers)
        return matrices

    def _rows_of_merged(self) -> dict[tuple[str, ...], list[int]]:
        """Return the rows of each tensor in a merged matrix, by the merged tensors' names."""
        rows = {}
        for name in LINEARS:
            for node in self._program.nodes(name):
                weights = [
                    input_node
                    for input_node in node.all_input_nodes[1:]
                    if input_node.op == "get_attr"
                ]
                for weight in weights:
                    sources = self._program.weights[str(weight.target)].sources
                    if len(sources) > 1:
                        (split,) = node.users
                        sizes: Any = split.args[1]
                        rows[sources] = list(sizes)
        return rows
