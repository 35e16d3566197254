"""Quantized matrices, and codes as a stream of bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format


@dataclass(frozen=True)
class PackedTensor:
    """A matrix `[N, K]` as integers: exactly what a target stores, in whatever order it likes.

    `codes` are uint8 `[N, G * group]`, one code a byte, `G` groups a row; columns past `K` hold
    the zero point. `scales` are `[N, G]` in the format's scale dtype, `zeros` uint8 `[N, G]`, or
    None where the format is symmetric. A weight is `(code - zero) * scale`. A palette has codes
    `[N, K]` and tables `[N, 2^bits]` as its `scales`; a weight is `scales[row, code]`.
    """

    format: Format
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def dequantize(self) -> Tensor:
        """The weights that these codes stand for, float32 `[N, K]`, computed in float32."""
        rows, columns = self.shape
        if self.format.palette:
            return self.scales.float().gather(1, self.codes.long())
        zeros: Tensor | int = self.format.zero_point
        if self.zeros is not None:
            zeros = self.zeros.unsqueeze(-1).float()
        grouped = self.codes.view(rows, -1, self.format.span(columns)).float()  # (N, G, group)
        weights = (grouped - zeros) * self.scales.float().unsqueeze(-1)
        return weights.view(rows, -1)[:, :columns].contiguous()

    def signed_codes(self) -> Tensor:
        """Codes of a symmetric format with zero in the middle, int8."""
        return (self.codes.short() - self.format.zero_point).to(torch.int8)

    def packed_codes(self) -> Tensor:
        """Codes as bit streams, uint8 `[N, ceil(G * group * bits / 8)]`."""
        return pack_bits(self.codes, self.format.bits)

    def packed_zeros(self) -> Tensor | None:
        """Zero points as bit streams, uint8 `[N, ceil(G * bits / 8)]`."""
        return None if self.zeros is None else pack_bits(self.zeros, self.format.bits)

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)


def stack_rows(pieces: Sequence[PackedTensor]) -> PackedTensor:
    """One matrix out of several with the same columns and format, rows in order."""
    if len(pieces) == 1:
        return pieces[0]
    zeros = [p.zeros for p in pieces if p.zeros is not None]
    return PackedTensor(
        format=pieces[0].format,
        shape=(sum(p.shape[0] for p in pieces), pieces[0].shape[1]),
        codes=torch.cat([p.codes for p in pieces]),
        scales=torch.cat([p.scales for p in pieces]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def split_rows(stacked: PackedTensor, rows: Sequence[int]) -> list[PackedTensor]:
    """The inverse of `stack_rows`: pieces of so many rows, in order."""
    zeros = [None] * len(rows) if stacked.zeros is None else stacked.zeros.split(list(rows))
    parts = zip(
        rows, stacked.codes.split(list(rows)), stacked.scales.split(list(rows)), zeros, strict=True
    )
    columns = stacked.shape[1]
    return [PackedTensor(stacked.format, (n, columns), c, s, z) for n, c, s, z in parts]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., n]` below `2^bits` as little-endian bit streams along the last dim.

    The first code takes the lowest bits of the first byte; a stream is padded with zero bits to
    `ceil(n * bits / 8)` whole bytes. Eight codes fill `bits` bytes, so they travel as one word.
    Raises `ValueError` for a width outside 1..8 or a code that needs more.
    """
    _check_width(bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    count = codes.shape[-1]
    shape = (*codes.shape[:-1], -(-count // 8), 8)
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).view(shape)
    words = torch.zeros(padded.shape[:-1], dtype=torch.int64)
    for i in range(8):
        words |= padded[..., i].long() << (bits * i)
    packed = torch.stack([(words >> (8 * j)) & 0xFF for j in range(bits)], dim=-1)
    return packed.flatten(-2)[..., : -(-count * bits // 8)].to(torch.uint8).contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 `[..., count]` from bytes `[..., ceil(count * bits / 8)]`.

    Raises `ValueError` for a width outside 1..8 or streams of another length.
    """
    _check_width(bits)
    wanted = -(-count * bits // 8)
    if packed.shape[-1] != wanted:
        raise ValueError(f"{count} codes of {bits} bits do not fill {packed.shape[-1]} bytes")
    shape = (*packed.shape[:-1], -(-wanted // bits), bits)
    padded = torch.nn.functional.pad(packed, (0, -wanted % bits)).view(shape)
    words = torch.zeros(padded.shape[:-1], dtype=torch.int64)
    for j in range(bits):
        words = words | padded[..., j].long() << (8 * j)  # not in place: this gets decomposed
    codes = torch.stack([(words >> (bits * i)) & ((1 << bits) - 1) for i in range(8)], dim=-1)
    return codes.flatten(-2)[..., :count].to(torch.uint8).contiguous()


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
