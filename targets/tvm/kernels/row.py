"""One row of an n-bit matrix, number by number: rows behind whole blocks, tables, and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.shared.row_blocks import PLANES, ROWS
from lfmc.targets.tvm.kernels.builder import Buffer, Expr, bind, cast, i32, local, put, u32
from lfmc.targets.tvm.kernels.layout import COLUMNS
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix


@dataclass(frozen=True)
class Row:
    """A row of a matrix, number by number: `lane` of a whole block, or of the rows behind them."""

    matrix: Matrix
    constants: Sequence[Buffer]
    block: Expr
    lane: Expr
    which: Expr = 0
    in_tail: bool = False

    @property
    def _lanes(self) -> int:
        return self.matrix.tail if self.in_tail else ROWS

    def quad(self, group: Expr, chunk: Expr, index: int) -> Expr:
        """Codes of four columns, a byte each: uint32."""
        m, lanes = self.matrix, self._lanes
        bits, piece = m.format.bits, group * m.chunks + chunk
        start = self.block * (ROWS * m.words) + piece * (bits * lanes) + self.lane
        found, done = None, 0
        for plane in PLANES[bits]:
            each = 8 // plane
            word = self.constants[0][self.which, start + (done + index // each) * lanes]
            mask = ((1 << plane) - 1) * 0x01010101
            part = ((word >> u32(index % each * plane)) & u32(mask)) << u32(done)
            found = part if found is None else found | part
            done += plane
        return found

    def scale(self, group: Expr) -> Expr:
        """Float32."""
        m = self.matrix
        at = self.block * (ROWS * m.groups) + group * self._lanes + self.lane
        return cast(self.constants[1][self.which, at], "float32")

    def zero(self, group: Expr) -> Expr:
        """Int32: out of the planes of a whole block, or out of the bit stream of the rest."""
        m = self.matrix
        if m.format.symmetric:
            return i32(m.format.zero_point)
        bits, held = m.format.bits, self.constants[2]
        if self.in_tail:
            bit = (group * m.tail + self.lane) * bits
            first = self.block * (m.groups * 2 * bits) + tirx.floordiv(bit, 8)
            low, high = held[0, first], held[0, tirx.min(first + 1, m.zeros_nbytes - 1)]
            word = cast(low, "uint32") | (cast(high, "uint32") << u32(8))
            shifted = word >> cast(tirx.floormod(bit, 8), "uint32")
            return cast(shifted & u32((1 << bits) - 1), "int32")
        start, found, done = (self.block * m.groups + group) * (2 * bits), u32(0), 0
        for plane in PLANES[bits]:
            bit = self.lane * plane
            byte = held[self.which, start + 2 * done + tirx.floordiv(bit, 8)]
            part = cast(byte, "uint32") >> cast(tirx.floormod(bit, 8), "uint32")
            found = found | ((part & u32((1 << plane) - 1)) << u32(done))
            done += plane
        return cast(found, "int32")


def multiply_row(row: Row, x: Activations, token: Expr, *, exact: bool) -> Expr:
    """The product of one row with a token."""
    m = row.matrix
    total = local(1)
    put(total, tirx.const(0.0, "float32"), 0)
    with T.serial(0, m.groups) as group:
        own = local(1, "float32" if exact else "int32")
        put(own, tirx.const(0, "float32" if exact else "int32"), 0)
        zero = bind(row.zero(group))
        with T.serial(0, m.chunks) as chunk:
            for quad in range(8):
                word = bind(row.quad(group, chunk, quad))
                for byte in range(4):
                    column = (group * m.chunks + chunk) * COLUMNS + 4 * quad + byte
                    code = code_of(word, byte) - zero
                    put(own, own[0] + _times(code, x, token, column, byte, exact), 0)
        scale = row.scale(group) if exact else row.scale(group) * x.buffers[1][token, group]
        put(total, total[0] + cast(own[0], "float32") * scale, 0)
    return total[0]


def _times(code: Expr, x: Activations, token: Expr, column: Expr, byte: int, exact: bool) -> Expr:
    if exact:
        return cast(code, "float32") * x.buffers[0][token, column]
    word = x.buffers[0][token, tirx.floordiv(column, 4)]
    return code * ((word << i32(24 - 8 * byte)) >> i32(24))


def code_of(word: Expr, byte: int) -> Expr:
    """One code of four, int32."""
    return cast((word >> u32(8 * byte)) & u32(255), "int32")


def weights_of_row(row: Row, y: Buffer, to: Expr) -> None:
    """A row as float32, into row `to` of `y`."""
    m = row.matrix
    with T.serial(0, m.groups) as group:
        zero, scale = bind(row.zero(group)), bind(row.scale(group))
        with T.serial(0, m.chunks) as chunk:
            for quad in range(8):
                word = bind(row.quad(group, chunk, quad))
                for byte in range(4):
                    column = (group * m.chunks + chunk) * COLUMNS + 4 * quad + byte
                    put(y, cast(code_of(word, byte) - zero, "float32") * scale, to, column)


def in_block_or_tail(
    matrix: Matrix, constants: Sequence[Buffer], row: Expr, use: Callable[[Row], None]
) -> None:
    """Have `use` write what is to be done with a row, wherever it is."""
    block, lane = tirx.floordiv(row, ROWS), tirx.floormod(row, ROWS)
    if not matrix.tail:
        use(Row(matrix, constants, block, lane))
        return
    with T.If(block < matrix.blocks):
        with T.Then():
            use(Row(matrix, constants, block, lane))
        with T.Else():
            use(Row(matrix, constants, block, lane, in_tail=True))
