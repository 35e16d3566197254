"""The layout of n-bit matrices in the parameters: blocks of 16 rows by 32 columns.

A vector register takes one 32-bit word of each of 16 rows. A word takes four columns of 8 bits, as
int8 dot products require. So the codes of 32 columns fill as many vectors as a code has bits.
Widths that do not divide 8 are cut into planes: 3 bits into 2 and 1, 6 bits into 4 and 2.

    codes   uint8 [N / 16, K / 32, bits, 16, 4]   a plane of p bits (see `PLANES`) has p words per
                                                  lane. Byte i of word j // n has the bits of
                                                  column 4 j + i, from bit p (j % n) on; n = 8 / p
    scales  float16 [N / 16, G, 16]
    zeros   uint8 [N / 16, G, 2 bits]             16 lanes as bit streams, in planes, too

Rows that do not fill a block form a block of fewer lanes behind the whole blocks. No byte is
padding, and every kind of CPU reads the same file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import pack_bits, unpack_bits
from lfmc.targets.shared.row_blocks import PLANES, ROWS

COLUMNS = 32


def row_spans(rows: int) -> list[tuple[int, int]]:
    """Return the spans of rows that are stored in one piece: all whole blocks, and the remaining
    rows."""
    whole_rows = rows // ROWS * ROWS
    return [span for span in ((0, whole_rows), (whole_rows, rows)) if span[1] > span[0]]


def lane_count(start: int, end: int) -> int:
    """Return the lanes of the blocks in a span of rows."""
    return min(ROWS, end - start)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 `[N, K]` in the order above: uint8 `[N * K * bits / 8]`."""
    return torch.cat(
        [
            _pack_block(codes[start:end], bits, lane_count(start, end))
            for start, end in _spans(codes)
        ]
    )


def unpack_codes(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Invert `pack_codes`: uint8 `[N, K]`."""
    pieces, offset = [], 0
    for start, end in row_spans(rows):
        size = (end - start) * columns * bits // 8
        pieces.append(
            _unpack_block(
                packed[offset : offset + size], bits, lane_count(start, end), end - start, columns
            )
        )
        offset += size
    return torch.cat(pieces)


def pack_groups(values: Tensor) -> Tensor:
    """Pack one value of each row and group `[N, G]`, with the lanes of a block adjacent."""
    groups = values.shape[1]
    return torch.cat(
        [
            values[start:end].view(-1, lane_count(start, end), groups).transpose(1, 2).flatten()
            for start, end in _spans(values)
        ]
    )


def unpack_groups(packed: Tensor, rows: int, groups: int) -> Tensor:
    """Invert `pack_groups`: `[N, G]`."""
    pieces, offset = [], 0
    for start, end in row_spans(rows):
        size = (end - start) * groups
        piece = packed[offset : offset + size].view(-1, groups, lane_count(start, end))
        pieces.append(piece.transpose(1, 2).flatten(0, 1))
        offset += size
    return torch.cat(pieces)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Pack zero points uint8 `[N, G]`: whole blocks as planes of 16 lanes, the remaining rows as a
    bit stream."""
    groups = zeros.shape[1]
    pieces = []
    for start, end in row_spans(zeros.shape[0]):
        lanes = lane_count(start, end)
        flat = pack_groups(zeros[start:end]).view(-1, lanes)
        if lanes < ROWS:
            pieces.append(pack_bits(flat.view(1, -1), bits).flatten())
            continue
        planes = [pack_bits(plane, size) for plane, size in _split_planes(flat, bits)]
        pieces.append(torch.cat(planes, 1).flatten())
        assert pieces[-1].numel() == (end - start) * groups * bits // 8
    return torch.cat(pieces)


def unpack_zeros(packed: Tensor, bits: int, rows: int, groups: int) -> Tensor:
    """Invert `pack_zeros`: uint8 `[N, G]`."""
    pieces, offset = [], 0
    for start, end in row_spans(rows):
        lanes, count = lane_count(start, end), (end - start) * groups
        size = -(-count * bits // 8)
        piece, offset = packed[offset : offset + size], offset + size
        if lanes < ROWS:
            flat = unpack_bits(piece.view(1, -1), bits, count).flatten()
        else:
            piece = piece.view(-1, 2 * bits)
            flat = torch.zeros(len(piece), ROWS, dtype=torch.uint8)
            low_bit = 0
            for plane in PLANES[bits]:
                plane_bytes = piece[:, 2 * low_bit : 2 * (low_bit + plane)]
                flat |= unpack_bits(plane_bytes, plane, ROWS) << low_bit
                low_bit += plane
        pieces.append(unpack_groups(flat.flatten(), end - start, groups))
    return torch.cat(pieces)


def _spans(values: Tensor) -> list[tuple[int, int]]:
    return row_spans(values.shape[0])


def _split_planes(codes: Tensor, bits: int) -> list[tuple[Tensor, int]]:
    """Split codes into planes; return each plane and its number of bits."""
    planes, low_bit = [], 0
    for plane in PLANES[bits]:
        planes.append(((codes >> low_bit) & ((1 << plane) - 1), plane))
        low_bit += plane
    return planes


def _pack_block(codes: Tensor, bits: int, lanes: int) -> Tensor:
    columns = codes.shape[1]
    quads = codes.reshape(-1, lanes, columns // COLUMNS, 8, 4).permute(0, 2, 3, 1, 4)
    words = []  # of each plane [blocks, K / 32, plane, lanes, 4]
    for part, plane in _split_planes(quads, bits):
        codes_per_byte = 8 // plane
        shifted = [
            part[:, :, index::codes_per_byte] << (plane * index) for index in range(codes_per_byte)
        ]
        words.append(_bitwise_or(shifted))
    return torch.cat(words, 2).flatten()


def _unpack_block(packed: Tensor, bits: int, lanes: int, rows: int, columns: int) -> Tensor:
    words = packed.view(rows // lanes, columns // COLUMNS, bits, lanes, 4)
    quads = torch.zeros(rows // lanes, columns // COLUMNS, 8, lanes, 4, dtype=torch.uint8)
    low_bit = 0
    for plane in PLANES[bits]:
        part, codes_per_byte = words[:, :, low_bit : low_bit + plane], 8 // plane
        for index in range(codes_per_byte):
            quads[:, :, index::codes_per_byte] |= (
                (part >> (plane * index)) & ((1 << plane) - 1)
            ) << low_bit
        low_bit += plane
    return quads.permute(0, 3, 1, 2, 4).reshape(rows, columns)


def _bitwise_or(parts: Sequence[Tensor]) -> Tensor:
    result = parts[0].clone()
    for part in parts[1:]:
        result |= part
    return result
