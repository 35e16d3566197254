"""A program's constants as an accelerator's graph takes them, and as they lie in the file.

    codes   signed, of a matrix `[K, N]` in row-major order: int8, or two of 4 bits a byte (the
            lower half first)
    scales  float32 [N]
    floats  float16

The embedding is the host's. Where a head shares its table it takes columns of that; else, and for
hosts that have only compiled graphs, rows: codes uint8 `[V, bytes]`, as plans have them, and scales
`[V, 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import ROW, Floats, Format
from lfmc.calib_free.grid.packed_tensor import pack_bits, unpack_bits
from lfmc.errors import UnsupportedError
from lfmc.targets.base import StoredTensor
from lfmc.targets.shared.constants import Constants
from lfmc.targets.shared.parameters_file import Parameter, Parameters

FORMATS = tuple(Format(bits, ROW, True, "float32") for bits in (4, 8))
HOST = "host#"  # begins the names of what the host keeps


@dataclass(frozen=True)
class Matrix:
    """An n-bit matrix `[K, N]`; `codes` has `bits` a number."""

    bits: int
    shape: tuple[int, int]
    codes: Parameter
    scales: Parameter


class NpuConstants(Constants):
    """Constants by the checkpoint's names, one tensor each."""

    def shape_of(self, sources: tuple[str, ...]) -> tuple[int, ...]:
        """Of a constant in a graph: matrices are `[K, N]`."""
        (name,) = sources
        shape = tuple(self.weights.checkpoint.tensors[name].shape)
        return shape[::-1] if len(shape) == 2 else shape

    def constant(self, sources: tuple[str, ...]) -> Matrix | Parameter:
        """A constant of the graph in the file."""
        (name,) = sources
        format = self.weights.format(name)
        if isinstance(format, Floats):
            return self._floats(name, format, self.shape_of(sources))
        columns, rows = self.shape_of(sources)
        count = columns * rows * format.bits
        if rows * format.bits % 8:
            raise UnsupportedError("rows of a matrix do not fill whole bytes", where=name)

        def codes() -> Tensor:
            signed = self.weights.packed(sources).signed_codes()[:, :columns].T
            low = signed.to(torch.int16) & ((1 << format.bits) - 1)
            return pack_bits(low.to(torch.uint8).reshape(1, -1), format.bits)[0]

        def scales() -> Tensor:
            return self.weights.packed(sources).scales[:, 0].contiguous()

        end = f"#{format.bits}:{columns}:{rows}"
        dtype, add = "uint8", self.add
        return Matrix(
            format.bits,
            (columns, rows),
            add(f"{name}{end}", dtype, (count // 8,), "codes", sources, "rows", codes),
            add(f"{name}#scales", "float32", (rows,), "scales", sources, "rows", scales),
        )

    def table(self, name: str) -> list[Parameter]:
        """Rows of the embedding, by themselves."""
        format = self.weights.format(name)
        rows, columns = self.shape(name)
        if isinstance(format, Floats):
            make = lambda: self.weights.floats((name,))  # noqa: E731
            return [Parameter(HOST + name, format.dtype, (rows, columns), make)]
        width = -(-columns * format.bits // 8)
        codes = lambda: self.weights.packed((name,)).packed_codes()  # noqa: E731
        scales = lambda: self.weights.packed((name,)).scales  # noqa: E731
        return [
            Parameter(f"{HOST}{name}#codes", "uint8", (rows, width), codes),
            Parameter(f"{HOST}{name}#scales", "float32", (rows, 1), scales),
        ]

    def keep_table(self, name: str) -> list[Parameter]:
        """The same as tensors of the plan, where no graph holds them."""
        made = self.table(name)
        for own in made:
            part = own.name.rpartition("#")[2] if own.name.count("#") > 1 else "values"
            self.stored.append(StoredTensor(own.name, part, (name,), "rows", own.nbytes))
        return made

    def _floats(self, name: str, format: Floats, shape: tuple[int, ...]) -> Parameter:
        def make() -> Tensor:
            value = self.weights.floats((name,))
            if not bool(value.isfinite().all()):
                raise UnsupportedError("a weight is too large for float16", where=name)
            return value.T.contiguous() if value.ndim == 2 else value

        return self.add(name, format.dtype, shape, "values", (name,), "rows", make)


def embed(held: Parameters, name: str, bits: int, ids: Tensor) -> Tensor:
    """Float32 `[T, H]` of tokens, from rows or from the head's columns; of `bits` 0 they are
    floats."""
    names = held.names
    if not bits:
        if HOST + name in names:
            return held.tensor(HOST + name)[ids].float()
        return held.tensor(name)[:, ids].T.float()
    middle = 1 << (bits - 1)
    if f"{HOST}{name}#codes" in names:
        packed, scales = (held.tensor(f"{HOST}{name}#{part}")[ids] for part in ("codes", "scales"))
        columns = packed.shape[1] * 8 // bits
        return (unpack_bits(packed, bits, columns).float() - middle) * scales
    full = _codes_name(held, name)
    _, columns, rows = _sizes(full)
    each = 8 // bits
    lanes = held.tensor(full).view(columns, rows // each)[:, ids // each].int()
    codes = (lanes >> (bits * (ids % each))) & ((1 << bits) - 1)
    signed = (codes ^ middle) - middle
    return (signed.float() * held.tensor(f"{name}#scales")[ids]).T


def matrix_bits(held: Parameters, name: str) -> int:
    """How wide a tensor's codes are in a file; 0 where it is of floats."""
    return 0 if name in held.names else _sizes(_codes_name(held, name))[0]


def read_matrix(held: Parameters, name: str) -> tuple[Tensor, Tensor]:
    """Signed codes int8 `[N, K]` and scales `[N]`."""
    full = _codes_name(held, name)
    bits, columns, rows = _sizes(full)
    codes = unpack_bits(held.tensor(full)[None], bits, columns * rows)[0].int()
    middle = 1 << (bits - 1)
    signed = ((codes ^ middle) - middle).to(torch.int8)
    return signed.view(columns, rows).T.contiguous(), held.tensor(f"{name}#scales")


def _codes_name(held: Parameters, name: str) -> str:
    return next(own for own in held.names if own.startswith(f"{name}#") and ":" in own)


def _sizes(name: str) -> tuple[int, int, int]:
    """Bits, columns and rows, of a matrix whose codes have that name."""
    bits, columns, rows = map(int, name.rpartition("#")[2].split(":"))
    return bits, columns, rows


def read(held: Parameters, stored: StoredTensor) -> Tensor:
    """A constant as the plan has it."""
    value, name = held.tensor(stored.name), stored.name
    if name.startswith(HOST) or stored.part == "values":
        return value.clone() if name.startswith(HOST) or value.ndim != 2 else value.T.contiguous()
    if stored.part == "scales":
        return value[:, None].clone()
    bits, columns, rows = _sizes(name)
    codes = unpack_bits(value[None], bits, columns * rows)[0]
    middle = 1 << (bits - 1)
    return pack_bits((codes ^ middle).view(columns, rows).T.contiguous(), bits)
