"""Quantized matrices, and the packing of codes into bit streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format


@dataclass(frozen=True)
class PackedTensor:
    """A matrix `[N, K]` as integers: exactly the values that a target stores, in any order.

    `codes` are uint8 `[N, G * group]`, one code per byte, `G` groups per row; columns past `K`
    hold the zero point. `scales` are `[N, G]` in the format's scale dtype, `zeros` uint8 `[N, G]`,
    or None if the format is symmetric. A weight is `(code - zero) * scale`. A palette has codes
    `[N, K]` and tables `[N, 2^bits]` as its `scales`; a weight is `scales[row, code]`.
    """

    format: Format
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def dequantize(self) -> Tensor:
        """Return the dequantized weights, float32 `[N, K]`, computed in float32."""
        rows, columns = self.shape
        if self.format.palette:
            return self.scales.float().gather(1, self.codes.long())
        zeros: Tensor | int = self.format.zero_point
        if self.zeros is not None:
            zeros = self.zeros.unsqueeze(-1).float()
        group = self.format.columns_per_group(columns)
        grouped = self.codes.view(rows, -1, group).float()  # (N, G, group)
        weights = (grouped - zeros) * self.scales.float().unsqueeze(-1)
        return weights.view(rows, -1)[:, :columns].contiguous()

    def signed_codes(self) -> Tensor:
        """Return the codes of a symmetric format, shifted so that 0 is the zero point, int8."""
        return (self.codes.short() - self.format.zero_point).to(torch.int8)

    def packed_codes(self) -> Tensor:
        """Return the codes as bit streams, uint8 `[N, ceil(G * group * bits / 8)]`."""
        return pack_bits(self.codes, self.format.bits)

    def packed_zeros(self) -> Tensor | None:
        """Return the zero points as bit streams, uint8 `[N, ceil(G * bits / 8)]`."""
        return None if self.zeros is None else pack_bits(self.zeros, self.format.bits)

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)


def stack_rows(pieces: Sequence[PackedTensor]) -> PackedTensor:
    """Concatenate the rows of matrices with the same columns and format."""
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
    """Invert `stack_rows`: return one piece for each number of rows in `rows`, in order."""
    zeros = [None] * len(rows) if stacked.zeros is None else stacked.zeros.split(list(rows))
    parts = zip(
        rows, stacked.codes.split(list(rows)), stacked.scales.split(list(rows)), zeros, strict=True
    )
    columns = stacked.shape[1]
    return [PackedTensor(stacked.format, (n, columns), c, s, z) for n, c, s, z in parts]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 `[..., n]` below `2^bits` into little-endian bit streams along the last dim.

    The first code takes the lowest bits of the first byte. Each stream is padded with zero bits to
    `ceil(n * bits / 8)` whole bytes. Eight codes fill `bits` bytes, so eight codes are packed as
    one word. Raises `ValueError` for a width outside 1..8 or a code that needs more bits.
    """
    _check_width(bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    if 8 % bits == 0:
        return _pack_whole(codes, bits)
    count = codes.shape[-1]
    shape = (*codes.shape[:-1], -(-count // 8), 8)
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).view(shape)
    words = torch.zeros(padded.shape[:-1], dtype=torch.int64)
    for i in range(8):
        words |= padded[..., i].long() << (bits * i)
    planes = [((words >> (8 * j)) & 0xFF).to(torch.uint8) for j in range(bits)]
    return torch.stack(planes, dim=-1).flatten(-2)[..., : -(-count * bits // 8)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack bit streams of `pack_bits`: `[..., ceil(count * bits / 8)]` to uint8 `[..., count]`.

    Raises `ValueError` for a width outside 1..8 or streams of another length.
    """
    _check_width(bits)
    nbytes = -(-count * bits // 8)
    if packed.shape[-1] != nbytes:
        raise ValueError(f"{count} codes of {bits} bits do not fill {packed.shape[-1]} bytes")
    if 8 % bits == 0:
        return _unpack_whole(packed, bits, count)
    shape = (*packed.shape[:-1], -(-nbytes // bits), bits)
    padded = torch.nn.functional.pad(packed, (0, -nbytes % bits)).view(shape)
    words = torch.zeros(padded.shape[:-1], dtype=torch.int64)
    for j in range(bits):
        # Not in place: an operator that calls this function is decomposed.
        words = words | padded[..., j].long() << (8 * j)
    codes = torch.stack([(words >> (bits * i)) & ((1 << bits) - 1) for i in range(8)], dim=-1)
    return codes.flatten(-2)[..., :count].to(torch.uint8).contiguous()


def _pack_whole(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of a width that divides 8, so that no code is in two bytes."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    packed = padded[..., 0::per_byte].clone()
    for i in range(1, per_byte):
        packed |= padded[..., i::per_byte] << (bits * i)
    return packed


def _unpack_whole(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack codes of a width that divides 8, so that no code is in two bytes."""
    mask, per_byte = (1 << bits) - 1, 8 // bits
    codes = torch.stack([(packed >> (bits * i)) & mask for i in range(per_byte)], dim=-1)
    return codes.flatten(-2)[..., :count].contiguous()


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
