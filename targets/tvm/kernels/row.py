"""One row of an n-bit matrix, number by number: for rows behind whole blocks, tables, and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.shared.row_blocks import PLANES, ROWS
from lfmc.targets.tvm.kernels.builder import Buffer, Expr, alloc_local, bind, cast, i32, store, u32
from lfmc.targets.tvm.kernels.layout import COLUMNS
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix


@dataclass(frozen=True)
class Row:
    """A row of a matrix, number by number: `lane` of a whole block, or of the rows behind the whole
    blocks."""

    matrix: Matrix
    constants: Sequence[Buffer]
    block: Expr
    lane: Expr
    member: Expr = 0
    in_tail: bool = False

    @property
    def _lanes(self) -> int:
        return self.matrix.tail if self.in_tail else ROWS

    def quad(self, group: Expr, chunk: Expr, index: int) -> Expr:
        """Load the codes of four columns: uint32, one byte per code."""
        matrix, lanes = self.matrix, self._lanes
        bits, chunk_index = matrix.format.bits, group * matrix.chunks + chunk
        start = self.block * (ROWS * matrix.words) + chunk_index * (bits * lanes) + self.lane
        codes, low_bit = None, 0
        for plane in PLANES[bits]:
            quads_per_word = 8 // plane
            word = self.constants[0][
                self.member, start + (low_bit + index // quads_per_word) * lanes
            ]
            mask = ((1 << plane) - 1) * 0x01010101
            part = ((word >> u32(index % quads_per_word * plane)) & u32(mask)) << u32(low_bit)
            codes = part if codes is None else codes | part
            low_bit += plane
        return codes

    def scale(self, group: Expr) -> Expr:
        """Load the scale of a group, float32."""
        matrix = self.matrix
        offset = self.block * (ROWS * matrix.groups) + group * self._lanes + self.lane
        return cast(self.constants[1][self.member, offset], "float32")

    def zero(self, group: Expr) -> Expr:
        """Load the zero point of a group, int32: from the planes of a whole block, or from the bit
        stream of the remaining rows."""
        matrix = self.matrix
        if matrix.format.symmetric:
            return i32(matrix.format.zero_point)
        bits, packed = matrix.format.bits, self.constants[2]
        if self.in_tail:
            bit = (group * matrix.tail + self.lane) * bits
            first = self.block * (matrix.groups * 2 * bits) + tirx.floordiv(bit, 8)
            low, high = packed[0, first], packed[0, tirx.min(first + 1, matrix.zeros_nbytes - 1)]
            word = cast(low, "uint32") | (cast(high, "uint32") << u32(8))
            shifted = word >> cast(tirx.floormod(bit, 8), "uint32")
            return cast(shifted & u32((1 << bits) - 1), "int32")
        start, zero, low_bit = (self.block * matrix.groups + group) * (2 * bits), u32(0), 0
        for plane in PLANES[bits]:
            bit = self.lane * plane
            byte = packed[self.member, start + 2 * low_bit + tirx.floordiv(bit, 8)]
            part = cast(byte, "uint32") >> cast(tirx.floormod(bit, 8), "uint32")
            zero = zero | ((part & u32((1 << plane) - 1)) << u32(low_bit))
            low_bit += plane
        return cast(zero, "int32")


def multiply_row(row: Row, x: Activations, token: Expr, *, exact: bool) -> Expr:
    """Return the product of one row with a token."""
    matrix = row.matrix
    total = alloc_local(1)
    store(total, tirx.const(0.0, "float32"), 0)
    with T.serial(0, matrix.groups) as group:
        group_sum = alloc_local(1, "float32" if exact else "int32")
        store(group_sum, tirx.const(0, "float32" if exact else "int32"), 0)
        zero = bind(row.zero(group))
        with T.serial(0, matrix.chunks) as chunk:
            for quad in range(8):
                word = bind(row.quad(group, chunk, quad))
                for byte in range(4):
                    column = (group * matrix.chunks + chunk) * COLUMNS + 4 * quad + byte
                    code = extract_code(word, byte) - zero
                    store(
                        group_sum,
                        group_sum[0] + _multiply_code(code, x, token, column, byte, exact),
                        0,
                    )
        scale = row.scale(group) if exact else row.scale(group) * x.buffers[1][token, group]
        store(total, total[0] + cast(group_sum[0], "float32") * scale, 0)
    return total[0]


def _multiply_code(
    code: Expr, x: Activations, token: Expr, column: Expr, byte: int, exact: bool
) -> Expr:
    if exact:
        return cast(code, "float32") * x.buffers[0][token, column]
    word = x.buffers[0][token, tirx.floordiv(column, 4)]
    return code * ((word << i32(24 - 8 * byte)) >> i32(24))


def extract_code(word: Expr, byte: int) -> Expr:
    """Extract one of four codes, int32."""
    return cast((word >> u32(8 * byte)) & u32(255), "int32")


def dequantize_row(row: Row, y: Buffer, y_row: Expr) -> None:
    """Dequantize a row to float32, into row `y_row` of `y`."""
    matrix = row.matrix
    with T.serial(0, matrix.groups) as group:
        zero, scale = bind(row.zero(group)), bind(row.scale(group))
        with T.serial(0, matrix.chunks) as chunk:
            for quad in range(8):
                word = bind(row.quad(group, chunk, quad))
                for byte in range(4):
                    column = (group * matrix.chunks + chunk) * COLUMNS + 4 * quad + byte
                    store(
                        y, cast(extract_code(word, byte) - zero, "float32") * scale, y_row, column
                    )


def emit_for_row(
    matrix: Matrix, constants: Sequence[Buffer], row: Expr, emit: Callable[[Row], None]
) -> None:
    """Call `emit` to build code for a row that may lie in a whole block or in the tail."""
    block, lane = tirx.floordiv(row, ROWS), tirx.floormod(row, ROWS)
    if not matrix.tail:
        emit(Row(matrix, constants, block, lane))
        return
    with T.If(block < matrix.blocks):
        with T.Then():
            emit(Row(matrix, constants, block, lane))
        with T.Else():
            emit(Row(matrix, constants, block, lane, in_tail=True))
