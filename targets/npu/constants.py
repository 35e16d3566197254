"""The constants of a program in an accelerator's graph, and their layout in the file.

    codes   signed, of a matrix `[K, N]` in row-major order: int8, or two 4-bit codes per byte (the
            first in the lower half)
    scales  float32 [N]
    floats  float16

The host looks up embeddings. If the head shares the embedding table, the host reads columns of the
head's matrix. Otherwise, and for hosts that have only compiled graphs, it reads rows: codes uint8
`[V, bytes]`, packed as in plans, and scales `[V, 1]`.
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
HOST = "host#"  # prefix of the names of tensors that only the host reads


@dataclass(frozen=True)
class Matrix:
    """An n-bit matrix `[K, N]`; each number of `codes` has `bits` bits."""

    bits: int
    shape: tuple[int, int]
    codes: Parameter
    scales: Parameter


class NpuConstants(Constants):
    """Constants by checkpoint name; each is one tensor of the checkpoint."""

    def shape_of(self, sources: tuple[str, ...]) -> tuple[int, ...]:
        """Return the shape of a constant in the graph; matrices are `[K, N]`."""
        (name,) = sources
        shape = tuple(self.weights.checkpoint.tensors[name].shape)
        return shape[::-1] if len(shape) == 2 else shape

    def constant(self, sources: tuple[str, ...]) -> Matrix | Parameter:
        """Add a constant of the graph to the file, and return it."""
        (name,) = sources
        format = self.weights.format(name)
        if isinstance(format, Floats):
            return self._floats(name, format, self.shape_of(sources))
        columns, rows = self.shape_of(sources)
        count = columns * rows * format.bits
        if rows * format.bits % 8:
            raise UnsupportedError("the rows of a matrix do not fill whole bytes", where=name)

        def codes() -> Tensor:
            signed = self.weights.packed(sources).signed_codes()[:, :columns].T
            low_bits = signed.to(torch.int16) & ((1 << format.bits) - 1)
            return pack_bits(low_bits.to(torch.uint8).reshape(1, -1), format.bits)[0]

        def scales() -> Tensor:
            return self.weights.packed(sources).scales[:, 0].contiguous()

        suffix = f"#{format.bits}:{columns}:{rows}"
        dtype, add = "uint8", self.add
        return Matrix(
            format.bits,
            (columns, rows),
            add(f"{name}{suffix}", dtype, (count // 8,), "codes", sources, "rows", codes),
            add(f"{name}#scales", "float32", (rows,), "scales", sources, "rows", scales),
        )

    def table(self, name: str) -> list[Parameter]:
        """Return the embedding table, stored by rows for the host."""
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

    def store_table(self, name: str) -> list[Parameter]:
        """Return the embedding table as stored tensors of the plan, if no graph contains it."""
        parameters = self.table(name)
        for parameter in parameters:
            has_part = parameter.name.count("#") > 1
            part = parameter.name.rpartition("#")[2] if has_part else "values"
            self.stored.append(
                StoredTensor(parameter.name, part, (name,), "rows", parameter.nbytes)
            )
        return parameters

    def _floats(self, name: str, format: Floats, shape: tuple[int, ...]) -> Parameter:
        def make() -> Tensor:
            value = self.weights.floats((name,))
            if not bool(value.isfinite().all()):
                raise UnsupportedError("a weight is too large for float16", where=name)
            return value.T.contiguous() if value.ndim == 2 else value

        return self.add(name, format.dtype, shape, "values", (name,), "rows", make)


def look_up(file: Parameters, name: str, bits: int, ids: Tensor) -> Tensor:
    """Return float32 embeddings `[T, H]`, from rows of a table or from columns of the head.

    The table is float if `bits` is 0.
    """
    names = file.names
    if not bits:
        if HOST + name in names:
            return file.tensor(HOST + name)[ids].float()
        return file.tensor(name)[:, ids].T.float()
    middle = 1 << (bits - 1)
    if f"{HOST}{name}#codes" in names:
        packed, scales = (file.tensor(f"{HOST}{name}#{part}")[ids] for part in ("codes", "scales"))
        columns = packed.shape[1] * 8 // bits
        return (unpack_bits(packed, bits, columns).float() - middle) * scales
    codes_name = _codes_name(file, name)
    _, columns, rows = _parse_sizes(codes_name)
    codes_per_byte = 8 // bits
    lanes = file.tensor(codes_name).view(columns, rows // codes_per_byte)
    lanes = lanes[:, ids // codes_per_byte].int()
    codes = (lanes >> (bits * (ids % codes_per_byte))) & ((1 << bits) - 1)
    signed = (codes ^ middle) - middle
    return (signed.float() * file.tensor(f"{name}#scales")[ids]).T


def matrix_bits(file: Parameters, name: str) -> int:
    """Return the bits of a tensor's codes in a file, or 0 if the tensor is float."""
    return 0 if name in file.names else _parse_sizes(_codes_name(file, name))[0]


def read_matrix(file: Parameters, name: str) -> tuple[Tensor, Tensor]:
    """Return signed codes int8 `[N, K]` and scales `[N]`."""
    codes_name = _codes_name(file, name)
    bits, columns, rows = _parse_sizes(codes_name)
    codes = unpack_bits(file.tensor(codes_name)[None], bits, columns * rows)[0].int()
    middle = 1 << (bits - 1)
    signed = ((codes ^ middle) - middle).to(torch.int8)
    return signed.view(columns, rows).T.contiguous(), file.tensor(f"{name}#scales")


def _codes_name(file: Parameters, name: str) -> str:
    return next(key for key in file.names if key.startswith(f"{name}#") and ":" in key)


def _parse_sizes(codes_name: str) -> tuple[int, int, int]:
    """Return bits, columns and rows of a matrix, which the name of its codes contains."""
    bits, columns, rows = map(int, codes_name.rpartition("#")[2].split(":"))
    return bits, columns, rows


def read_tensor(file: Parameters, stored: StoredTensor) -> Tensor:
    """Return a stored constant in the layout of the plan."""
    value, name = file.tensor(stored.name), stored.name
    if name.startswith(HOST) or stored.part == "values":
        return value.clone() if name.startswith(HOST) or value.ndim != 2 else value.T.contiguous()
    if stored.part == "scales":
        return value[:, None].clone()
    bits, columns, rows = _parse_sizes(name)
    codes = unpack_bits(value[None], bits, columns * rows)[0]
    middle = 1 << (bits - 1)
    return pack_bits((codes ^ middle).view(columns, rows).T.contiguous(), bits)
