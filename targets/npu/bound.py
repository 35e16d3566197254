"""Constants of a bound program, as graphs take them: an artifact is held against these."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from lfmc.calib_free.pack import unpack_bits
from lfmc.program import Program
from lfmc.targets.npu.host import Embed

LINEARS = ("aten.linear", "lfm.linear_nbits")


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
            whole = self._dequantized(name) if weight.part == "codes" else self._buffer(name)
            sizes = rows.get(weight.sources, [len(whole)])
            for source, value in zip(weight.sources, whole.split(sizes), strict=True):
                found[source] = value.T.contiguous() if value.ndim == 2 else value
        return found

    def _buffer(self, name: str) -> Tensor:
        return self._program.module.get_buffer(name)

    def _dequantized(self, codes: str) -> Tensor:
        """Of a symmetric format with one scale a row."""
        scales = self._buffer(f"{codes.removesuffix('.codes')}.scales")
        packed, columns = self._buffer(codes), self._columns[codes]
        bits = 8 * packed.shape[1] // columns
        return (unpack_bits(packed, bits, columns).float() - (1 << (bits - 1))) * scales

    @cached_property
    def _columns(self) -> dict[str, int]:
        """Columns of matrices, by the names of their codes."""
        found: dict[str, int] = {}
        for name, place in (
            ("lfm.linear_nbits", 1),
            ("lfm.embedding_nbits", 1),
            ("lfm.dequantize", 0),
        ):
            for node in self._program.nodes(name):
                codes: Any = node.args[place]
                columns: Any = node.args[-1]
                found[str(codes.target)] = columns
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
