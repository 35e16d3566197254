"""Products of a block of 16 rows of an n-bit matrix with some tokens, vector by vector.

`lfmc.targets.tvm.kernels.layout` describes the order of codes, scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.shared.row_blocks import PLANES, ROWS
from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    alloc_local,
    bind,
    broadcast,
    cast,
    float_vector,
    prefetch,
    store,
    vector,
)
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.kernels.dot import Int8Dot
from lfmc.targets.tvm.kernels.layout import COLUMNS
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix


@dataclass(frozen=True)
class RowBlock:
    """A whole block of rows of a matrix, one lane per row.

    `member` selects one of several matrices; `block` is the index of the block in that matrix.
    """

    matrix: Matrix
    constants: Sequence[Buffer]
    block: Expr
    member: Expr = 0

    def quads(self, group: Expr, chunk: Expr, lanes: int, first_row: int) -> list[Expr]:
        """Load the codes of 32 columns of `lanes` rows from row `first_row` on: 8 vectors uint32,
        one byte per code."""
        matrix = self.matrix
        start = self._start(group, chunk) + first_row
        words = [
            bind(vector(self.constants[0], self.member, start + word * ROWS, lanes=lanes))
            for word in range(matrix.format.bits)
        ]
        codes: list[Expr | None] = [None] * 8
        low_bit = 0
        for plane in PLANES[matrix.format.bits]:
            quads_per_word, mask = 8 // plane, ((1 << plane) - 1) * 0x01010101
            for quad in range(8):
                word, shift = words[low_bit + quad // quads_per_word], quad % quads_per_word * plane
                part = _shift(word, shift - low_bit, lanes)
                part = part & broadcast(mask << low_bit, "uint32", lanes) if plane < 8 else part
                code = codes[quad]
                codes[quad] = part if code is None else code | part
            low_bit += plane
        return [bind(quad) for quad in codes]

    def _start(self, group: Expr, chunk: Expr) -> Expr:
        matrix = self.matrix
        piece = (self.block * matrix.groups + group) * matrix.chunks + chunk
        return piece * (matrix.format.bits * ROWS)

    def prefetch_codes(self, group: Expr, chunk: Expr, ahead: int) -> None:
        """Prefetch the codes that lie `ahead` bytes after the codes of these 32 columns."""
        start = self._start(group, chunk) + ahead // 4
        for word in range(self.matrix.format.bits):
            prefetch(self.constants[0], self.member, start + word * ROWS)

    def scales(self, group: Expr) -> Expr:
        """Load the scales of a group, float32, one lane per row."""
        matrix = self.matrix
        start = (self.block * matrix.groups + group) * ROWS
        return float_vector(self.constants[1], self.member, start)

    def zeros(self, group: Expr) -> Expr:
        """Load the zero points of a group, int32, one lane per row."""
        matrix = self.matrix
        if matrix.format.symmetric:
            return broadcast(matrix.format.zero_point, "int32")
        bits, packed = matrix.format.bits, self.constants[2]
        start = (self.block * matrix.groups + group) * (2 * bits)
        zeros, low_bit = broadcast(0, "int32"), 0
        for plane in PLANES[bits]:
            part = _unpack_plane(packed, self.member, start + 2 * low_bit, plane)
            zeros = zeros | (part << broadcast(low_bit, "int32"))
            low_bit += plane
        return zeros


def _shift(value: Expr, right: int, lanes: int) -> Expr:
    if right == 0:
        return value
    bits = broadcast(abs(right), "uint32", lanes)
    return value >> bits if right > 0 else value << bits


def _unpack_plane(packed: Buffer, member: Expr, start: Expr, plane: int) -> Expr:
    """Unpack 16 lanes, int32, from `2 * plane` bytes."""
    if plane == 8:
        return cast(vector(packed, member, start), "int32")
    words = []
    for word in range(max(1, plane // 2)):
        count = min(4, 2 * plane)
        parts = [
            cast(packed[member, start + 4 * word + byte], "uint32")
            << tirx.const(8 * byte, "uint32")
            for byte in range(count)
        ]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined | part
        words.append(broadcast(bind(joined)))
    lane = tirx.Ramp(tirx.const(0, "int32"), 1, LANES)
    lanes_per_word = LANES // len(words)
    value = words[0]
    if len(words) == 2:
        value = tirx.Select(lane < broadcast(lanes_per_word, "int32"), words[0], words[1])
        lane = lane & broadcast(lanes_per_word - 1, "int32")
    shifts = cast(lane * broadcast(plane, "int32"), "uint32")
    return cast((value >> shifts) & broadcast((1 << plane) - 1, "uint32"), "int32")


def multiply(
    rows: RowBlock, x: Activations, tokens: list[Expr], cpu: Cpu, *, exact: bool
) -> list[Callable[[], Expr]]:
    """Multiply a block of rows with some tokens; return functions that read the results, each a
    vector of 16 rows."""
    sums = alloc_local(len(tokens) * ROWS)
    for index in range(len(tokens)):
        store(sums, broadcast(0.0), index * ROWS)
    with T.serial(0, rows.matrix.groups) as group:
        (_float_group if exact else _int8_group)(rows, x, tokens, cpu, group, sums)
    return [partial(vector, sums, index * ROWS) for index in range(len(tokens))]


def _int8_group(
    rows: RowBlock, x: Activations, tokens: list[Expr], cpu: Cpu, group: Expr, sums: Buffer
) -> None:
    """Add the products of one group with rounded activations to `sums`."""
    matrix, dot = rows.matrix, Int8Dot(cpu, rows.matrix.format.bits)
    codes, steps, code_sums = x.buffers
    totals = alloc_local(len(tokens) * ROWS, "int32")
    zeros = bind(rows.zeros(group) - broadcast(dot.code_offset, "int32"))
    for index, token in enumerate(tokens):
        store(
            totals,
            (broadcast(0, "int32") - zeros) * broadcast(code_sums[token, group]),
            index * ROWS,
        )
    with T.serial(0, matrix.chunks) if matrix.chunks > 1 else _SingleIteration() as chunk:
        column = group * (matrix.format.group // 4) + chunk * 8
        if len(tokens) == 1:  # memory bandwidth limits a single token
            rows.prefetch_codes(group, chunk, cpu.ahead)
        for first_row in range(0, ROWS, cpu.lanes):
            quads = rows.quads(group, chunk, cpu.lanes, first_row)
            for index, token in enumerate(tokens):
                place = index * ROWS + first_row
                _add_products(dot, quads, codes, token, column, totals, place)
    scales = bind(rows.scales(group))
    for index, token in enumerate(tokens):
        place = index * ROWS
        part = cast(vector(totals, place), "float32") * (scales * broadcast(steps[token, group]))
        store(sums, vector(sums, place) + part, place)


def _add_products(
    dot: Int8Dot,
    quads: list[Expr],
    codes: Buffer,
    token: Expr,
    column: Expr,
    totals: Buffer,
    place: int,
) -> None:
    """Add the products of 32 columns to `lanes` numbers of `totals`."""
    lanes = dot.cpu.lanes
    value = vector(totals, place, lanes=lanes)
    for first in range(0, 8, dot.steps_before_widening):
        part = broadcast(0, "int16", 2 * lanes) if dot.int16_sums else value
        for quad in range(first, first + dot.steps_before_widening):
            part = dot.step(part, quads[quad], codes[token, column + quad])
        value = dot.widen(value, part) if dot.int16_sums else part
    store(totals, value, place)


def _float_group(
    rows: RowBlock, x: Activations, tokens: list[Expr], cpu: Cpu, group: Expr, sums: Buffer
) -> None:
    """Add the products of one group with float activations to `sums`."""
    matrix = rows.matrix
    (values,) = x.buffers
    group_sums = alloc_local(len(tokens) * ROWS)
    zeros = bind(rows.zeros(group))
    for index in range(len(tokens)):
        store(group_sums, broadcast(0.0), index * ROWS)
    with T.serial(0, matrix.chunks) as chunk:
        quads = rows.quads(group, chunk, ROWS, 0)
        for quad, codes in enumerate(quads):
            for byte in range(4):
                code = (codes >> broadcast(8 * byte, "uint32")) & broadcast(255, "uint32")
                weight = bind(cast(cast(code, "int32") - zeros, "float32"))
                column = group * matrix.format.group + chunk * COLUMNS + 4 * quad + byte
                for index, token in enumerate(tokens):
                    previous = vector(group_sums, index * ROWS)
                    store(
                        group_sums,
                        previous + weight * broadcast(values[token, column]),
                        index * ROWS,
                    )
    scales = bind(rows.scales(group))
    for index in range(len(tokens)):
        previous = vector(sums, index * ROWS)
        store(sums, previous + vector(group_sums, index * ROWS) * scales, index * ROWS)


class _SingleIteration:
    """Stands in for a loop of one iteration."""

    def __enter__(self) -> int:
        return 0

    def __exit__(self, *error: object) -> None:
        return None
