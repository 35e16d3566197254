"""Constants of a bound program, as graphs take them: an artifact is held against these."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lfmc.graph.program import Program
from lfmc.targets.npu.host import Embed

LINEARS = ("aten.linear", "lfm.linear_nbits")
# Where an operator's codes, scales and zero points are among its operands.
OPERANDS = {"lfm.linear_nbits": 1, "lfm.embedding_nbits": 1, "lfm.dequantize": 0}


class Bound:
    """By the checkpoint's tensors, matrices `[K, N]`; what was merged is taken apart."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __call__(self, sources: tuple[str, ...]) -> Tensor:
        (name,) = sources
        return self._values[name]

    def embed(self, name: str) -> Embed:
        """Looks tokens up in a table."""
        return lambda ids: self((name,)).T[ids]

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        rows = self._rows()
        for name, weight in self._program.weights.items():
            if weight.part not in ("values", "codes"):
                continue
            whole = self._dequantized[name] if weight.part == "codes" else self._buffer(name)
            sizes = rows.get(weight.sources, [len(whole)])
            for source, value in zip(weight.sources, whole.split(sizes), strict=True):
                found[source] = value.T.contiguous() if value.ndim == 2 else value
        return found

    def _buffer(self, name: str) -> Tensor:
        return self._program.module.get_buffer(name)

    @cached_property
    def _dequantized(self) -> dict[str, Tensor]:
        """Matrices by the names of their codes, of whatever operators take them."""
        found: dict[str, Tensor] = {}
        for name, first in OPERANDS.items():
            for node in self._program.nodes(name):
                operands: Any = node.args[first : first + 3]
                parts = [None if own is None else self._buffer(own.target) for own in operands]
                numbers: Any = node.args[-3:]  # bits, group, columns
                found[operands[0].target] = torch.ops.lfm.dequantize(*parts, *numbers)
        return found

    def _rows(self) -> dict[tuple[str, ...], list[int]]:
        """How many rows each of some merged tensors has."""
        found = {}
        for name in LINEARS:
            for node in self._program.nodes(name):
                held = [own for own in node.all_input_nodes[1:] if own.op == "get_attr"]
                for own in held:
                    sources = self._program.weights[str(own.target)].sources
                    if len(sources) > 1:
                        (split,) = node.users
                        sizes: Any = split.args[1]
                        found[sources] = list(sizes)
        return found
