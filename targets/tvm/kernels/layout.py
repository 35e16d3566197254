"""How n-bit matrices lie in the parameters: blocks of 16 rows, 32 columns of them side by side.

A vector register takes one 32-bit word of each of 16 rows, and a word four columns of 8 bits, as
int8 dot products want them. So codes of 32 columns fill as many vectors as they have bits. Widths
that do not divide 8 are cut into planes: 3 bits are 2 and 1, 6 bits 4 and 2.

    codes   uint8 [N / 16, K / 32, bits, 16, 4]   of columns 4 j + i, plane p of byte i of the lane:
                                                  word 8 j' p / 8 ... (see `planes`)
    scales  float16 [N / 16, G, 16]
    zeros   uint8 [N / 16, G, 2 bits]             16 lanes as bit streams, in planes, too

Rows that do not fill a block are one of fewer lanes behind the others. No byte is padding, and
every kind of CPU reads the same file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import pack_bits, unpack_bits
from lfmc.targets.shared.row_blocks import PLANES, ROWS

COLUMNS = 32


def blocks_of(rows: int) -> list[tuple[int, int]]:
    """Spans of rows that are stored in one piece: all whole blocks, and what is left."""
    whole = rows // ROWS * ROWS
    return [span for span in ((0, whole), (whole, rows)) if span[1] > span[0]]


def lanes_of(start: int, end: int) -> int:
    return min(ROWS, end - start)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[N, K]` in the order above: uint8 `[N * K * bits / 8]`."""
    return torch.cat([_pack_block(codes[a:b], bits, lanes_of(a, b)) for a, b in _spans(codes)])


def unpack_codes(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 `[N, K]`."""
    pieces, at = [], 0
    for start, end in blocks_of(rows):
        size = (end - start) * columns * bits // 8
        pieces.append(
            _unpack_block(packed[at : at + size], bits, lanes_of(start, end), end - start, columns)
        )
        at += size
    return torch.cat(pieces)


def pack_groups(values: Tensor) -> Tensor:
    """A value of each row and group `[N, G]`, lanes of a block side by side: `[N * G]`."""
    groups = values.shape[1]
    return torch.cat(
        [
            values[a:b].view(-1, lanes_of(a, b), groups).transpose(1, 2).flatten()
            for a, b in _spans(values)
        ]
    )


def unpack_groups(packed: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `pack_groups`: `[N, G]`."""
    pieces, at = [], 0
    for start, end in blocks_of(rows):
        size = (end - start) * groups
        piece = packed[at : at + size].view(-1, groups, lanes_of(start, end))
        pieces.append(piece.transpose(1, 2).flatten(0, 1))
        at += size
    return torch.cat(pieces)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points uint8 `[N, G]`: of whole blocks planes of 16 lanes, of the rest a bit stream."""
    groups = zeros.shape[1]
    pieces = []
    for start, end in blocks_of(zeros.shape[0]):
        lanes = lanes_of(start, end)
        flat = pack_groups(zeros[start:end]).view(-1, lanes)
        if lanes < ROWS:
            pieces.append(pack_bits(flat.view(1, -1), bits).flatten())
            continue
        planes = [pack_bits(plane, size) for plane, size in _split(flat, bits)]
        pieces.append(torch.cat(planes, 1).flatten())
        assert pieces[-1].numel() == (end - start) * groups * bits // 8
    return torch.cat(pieces)


def unpack_zeros(packed: Tensor, bits: int, rows: int, groups: int) -> Tensor:
    """The inverse of `pack_zeros`: uint8 `[N, G]`."""
    pieces, at = [], 0
    for start, end in blocks_of(rows):
        lanes, count = lanes_of(start, end), (end - start) * groups
        size = -(-count * bits // 8)
        piece, at = packed[at : at + size], at + size
        if lanes < ROWS:
            flat = unpack_bits(piece.view(1, -1), bits, count).flatten()
        else:
            piece = piece.view(-1, 2 * bits)
            flat = torch.zeros(len(piece), ROWS, dtype=torch.uint8)
            done = 0
            for plane in PLANES[bits]:
                part = piece[:, 2 * done : 2 * (done + plane)]
                flat |= unpack_bits(part, plane, ROWS) << done
                done += plane
        pieces.append(unpack_groups(flat.flatten(), end - start, groups))
    return torch.cat(pieces)


def _spans(values: Tensor) -> list[tuple[int, int]]:
    return blocks_of(values.shape[0])


def _split(codes: Tensor, bits: int) -> list[tuple[Tensor, int]]:
    """A code's planes, and how many bits each has."""
    parts, done = [], 0
    for plane in PLANES[bits]:
        parts.append(((codes >> done) & ((1 << plane) - 1), plane))
        done += plane
    return parts


def _pack_block(codes: Tensor, bits: int, lanes: int) -> Tensor:
    columns = codes.shape[1]
    quads = codes.reshape(-1, lanes, columns // COLUMNS, 8, 4).permute(0, 2, 3, 1, 4)
    words = []  # of each plane [blocks, K / 32, plane, lanes, 4]
    for part, plane in _split(quads, bits):
        each = 8 // plane
        shifted = [part[:, :, at::each] << (plane * at) for at in range(each)]
        words.append(_either(shifted))
    return torch.cat(words, 2).flatten()


def _unpack_block(packed: Tensor, bits: int, lanes: int, rows: int, columns: int) -> Tensor:
    words = packed.view(rows // lanes, columns // COLUMNS, bits, lanes, 4)
    quads = torch.zeros(rows // lanes, columns // COLUMNS, 8, lanes, 4, dtype=torch.uint8)
    done = 0
    for plane in PLANES[bits]:
        part, each = words[:, :, done : done + plane], 8 // plane
        for at in range(each):
            quads[:, :, at::each] |= ((part >> (plane * at)) & ((1 << plane) - 1)) << done
        done += plane
    return quads.permute(0, 3, 1, 2, 4).reshape(rows, columns)


def _either(parts: Sequence[Tensor]) -> Tensor:
    result = parts[0].clone()
    for part in parts[1:]:
        result |= part
    return result
