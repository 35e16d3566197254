"""Reading n-bit matrices in TIR: codes, scales and zero points of a block of rows.

See `lfmc.targets.tvm.layout` for how they lie. Constants are a flat row for each
matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.calib_free.formats import Format
from lfmc.targets.tvm.cpus import Cpu
from lfmc.targets.tvm.kernels.builder import (
    LANES,
    Buffer,
    Expr,
    Parameter,
    bind,
    cast,
    dimension,
    floats,
    local,
    prefetch,
    put,
    vector,
    wide,
)
from lfmc.targets.tvm.kernels.dot import Products
from lfmc.targets.tvm.layout import COLUMNS, PLANES, ROWS


@dataclass(frozen=True)
class Matrix:
    """An n-bit matrix of a kernel: `count` of them, one behind the other, for experts.

    Sizes are numbers, or known only when the kernel is called: one kernel for matrices of all sizes
    is as fast, and a library of them small. `tail` are rows behind the whole blocks of 16.
    """

    format: Format
    rows: Expr
    columns: Expr
    groups: Expr
    tail: int
    count: Expr = 1

    @property
    def chunks(self) -> int:
        """Pieces of 32 columns in a group."""
        return self.format.group // COLUMNS

    @property
    def blocks(self) -> Expr:
        """Whole blocks of rows."""
        return _divided(self.rows, ROWS)

    @property
    def words(self) -> Expr:
        """32-bit words of a row's codes."""
        return _divided(self.columns, 32) * self.format.bits

    @property
    def zeros_nbytes(self) -> Expr:
        """Of one matrix."""
        return _divided(self.rows * self.groups * self.format.bits + 7, 8)

    def parameters(self, name: str) -> list[Parameter]:
        """Its constants as a kernel takes them: codes, scales and, where it has some, zeros."""
        found: list[Parameter] = [
            (f"{name}_codes", (self.count, self.rows * self.words), "uint32"),
            (f"{name}_scales", (self.count, self.rows * self.groups), "float16"),
        ]
        if not self.format.symmetric:
            found.append((f"{name}_zeros", (self.count, self.zeros_nbytes), "uint8"))
        return found


def _divided(size: Expr, by: int) -> Expr:
    return size // by if isinstance(size, int) else tirx.floordiv(size, by)


@dataclass(frozen=True)
class Rows:
    """Lanes of a matrix in a kernel: a whole block of them.

    `which` picks a matrix of several, `block` counts blocks of one.
    """

    matrix: Matrix
    constants: Sequence[Buffer]
    block: Expr
    which: Expr = 0

    def quads(self, group: Expr, chunk: Expr, lanes: int, at: int) -> list[Expr]:
        """Codes of 32 columns of `lanes` rows from row `at` on: 8 vectors uint32, a code a byte."""
        m = self.matrix
        start = self._start(group, chunk) + at
        words = [
            bind(vector(self.constants[0], self.which, start + word * ROWS, lanes=lanes))
            for word in range(m.format.bits)
        ]
        found: list[Expr | None] = [None] * 8
        done = 0
        for plane in PLANES[m.format.bits]:
            each, mask = 8 // plane, ((1 << plane) - 1) * 0x01010101
            for quad in range(8):
                word, shift = words[done + quad // each], quad % each * plane
                part = _shifted(word, shift - done, lanes)
                part = part & wide(mask << done, "uint32", lanes) if plane < 8 else part
                before = found[quad]
                found[quad] = part if before is None else before | part
            done += plane
        return [bind(quad) for quad in found]

    def _start(self, group: Expr, chunk: Expr) -> Expr:
        m = self.matrix
        piece = (self.block * m.groups + group) * m.chunks + chunk
        return piece * (m.format.bits * ROWS)

    def announce(self, group: Expr, chunk: Expr, ahead: int) -> None:
        """Have codes read that come so many bytes behind those of 32 columns."""
        start = self._start(group, chunk) + ahead // 4
        for word in range(self.matrix.format.bits):
            prefetch(self.constants[0], self.which, start + word * ROWS)

    def scales(self, group: Expr) -> Expr:
        """Float32, a lane a row."""
        m = self.matrix
        start = (self.block * m.groups + group) * ROWS
        return floats(self.constants[1], self.which, start)

    def zeros(self, group: Expr) -> Expr:
        """Int32, a lane a row."""
        m = self.matrix
        if m.format.symmetric:
            return wide(m.format.zero_point, "int32")
        bits, held = m.format.bits, self.constants[2]
        start = (self.block * m.groups + group) * (2 * bits)
        found, done = wide(0, "int32"), 0
        for plane in PLANES[bits]:
            part = _plane(held, self.which, start + 2 * done, plane)
            found = found | (part << wide(done, "int32"))
            done += plane
        return found


def _shifted(value: Expr, right: int, lanes: int) -> Expr:
    if right == 0:
        return value
    by = wide(abs(right), "uint32", lanes)
    return value >> by if right > 0 else value << by


def _plane(held: Buffer, which: Expr, start: Expr, plane: int) -> Expr:
    """Int32 of 16 lanes out of `2 * plane` bytes."""
    if plane == 8:
        return cast(vector(held, which, start), "int32")
    words = []
    for word in range(max(1, plane // 2)):
        count = min(4, 2 * plane)
        parts = [
            cast(held[which, start + 4 * word + byte], "uint32") << tirx.const(8 * byte, "uint32")
            for byte in range(count)
        ]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole | part
        words.append(wide(bind(whole)))
    lane = tirx.Ramp(tirx.const(0, "int32"), 1, LANES)
    each = LANES // len(words)
    value = words[0]
    if len(words) == 2:
        value = tirx.Select(lane < wide(each, "int32"), words[0], words[1])
        lane = lane & wide(each - 1, "int32")
    shifts = cast(lane * wide(plane, "int32"), "uint32")
    return cast((value >> shifts) & wide((1 << plane) - 1, "uint32"), "int32")


@dataclass(frozen=True)
class Activations:
    """What a product's kernel multiplies by: rows rounded to int8 in the matrix's groups (words of
    four `[T, K / 4]`, steps `[T, G]`, sums int32 `[T, G]`), or, for parity, floats `[T, K]`."""

    buffers: tuple[Buffer, ...]

    @staticmethod
    def parameters(matrix: Matrix, tokens: Expr, exact: bool) -> list[Parameter]:
        if exact:
            return [("x", (tokens, matrix.columns), "float32")]
        return [
            ("x", (tokens, _divided(matrix.columns, 4)), "int32"),
            ("x_steps", (tokens, matrix.groups), "float32"),
            ("x_sums", (tokens, matrix.groups), "int32"),
        ]


def sized(format: Format, tail: int, *, exact: bool, count: Expr = 1) -> Matrix:
    """A matrix of whatever size a kernel is given."""
    if exact:
        columns = dimension("K")
        groups = tirx.floordiv(columns, format.group)
    else:
        groups = dimension("G")
        columns = groups * format.group
    return Matrix(format, dimension("N"), columns, groups, tail, count)


def multiply(
    rows: Rows, x: Activations, tokens: list[Expr], cpu: Cpu, *, exact: bool
) -> list[Callable[[], Expr]]:
    """Products of a block of rows with some tokens; reads of the results, vectors of 16 rows."""
    sums = local(len(tokens) * ROWS)
    for index in range(len(tokens)):
        put(sums, wide(0.0), index * ROWS)
    with T.serial(0, rows.matrix.groups) as group:
        (_float_group if exact else _int8_group)(rows, x, tokens, cpu, group, sums)
    return [partial(vector, sums, index * ROWS) for index in range(len(tokens))]


def _int8_group(
    rows: Rows, x: Activations, tokens: list[Expr], cpu: Cpu, group: Expr, sums: Buffer
) -> None:
    m, products = rows.matrix, Products(cpu, rows.matrix.format.bits)
    codes, steps, totals = x.buffers
    whole = local(len(tokens) * ROWS, "int32")
    zeros = bind(rows.zeros(group) - wide(products.offset, "int32"))
    for index, token in enumerate(tokens):
        put(whole, (wide(0, "int32") - zeros) * wide(totals[token, group]), index * ROWS)
    with T.serial(0, m.chunks) if m.chunks > 1 else _once() as chunk:
        column = group * (m.format.group // 4) + chunk * 8
        if len(tokens) == 1:  # then it is memory that is waited for
            rows.announce(group, chunk, cpu.ahead)
        for at in range(0, ROWS, cpu.lanes):
            quads = rows.quads(group, chunk, cpu.lanes, at)
            for index, token in enumerate(tokens):
                place = index * ROWS + at
                _add(products, quads, codes, token, column, whole, place)
    scales = bind(rows.scales(group))
    for index, token in enumerate(tokens):
        place = index * ROWS
        part = cast(vector(whole, place), "float32") * (scales * wide(steps[token, group]))
        put(sums, vector(sums, place) + part, place)


def _add(
    products: Products,
    quads: list[Expr],
    codes: Buffer,
    token: Expr,
    column: Expr,
    whole: Buffer,
    place: int,
) -> None:
    """Add the products of 32 columns to `lanes` numbers of `whole`."""
    lanes = products.cpu.lanes
    value = vector(whole, place, lanes=lanes)
    for first in range(0, 8, products.run):
        part = wide(0, "int16", 2 * lanes) if products.narrow else value
        for quad in range(first, first + products.run):
            part = products.step(part, quads[quad], codes[token, column + quad])
        value = products.widen(value, part) if products.narrow else part
    put(whole, value, place)


def _float_group(
    rows: Rows, x: Activations, tokens: list[Expr], cpu: Cpu, group: Expr, sums: Buffer
) -> None:
    m = rows.matrix
    (values,) = x.buffers
    own = local(len(tokens) * ROWS)
    zeros = bind(rows.zeros(group))
    for index in range(len(tokens)):
        put(own, wide(0.0), index * ROWS)
    with T.serial(0, m.chunks) as chunk:
        quads = rows.quads(group, chunk, ROWS, 0)
        for quad, codes in enumerate(quads):
            for byte in range(4):
                code = (codes >> wide(8 * byte, "uint32")) & wide(255, "uint32")
                weight = bind(cast(cast(code, "int32") - zeros, "float32"))
                column = group * m.format.group + chunk * COLUMNS + 4 * quad + byte
                for index, token in enumerate(tokens):
                    before = vector(own, index * ROWS)
                    put(own, before + weight * wide(values[token, column]), index * ROWS)
    scales = bind(rows.scales(group))
    for index in range(len(tokens)):
        before = vector(sums, index * ROWS)
        put(sums, before + vector(own, index * ROWS) * scales, index * ROWS)


class _once:
    """In place of a loop that would turn once."""

    def __enter__(self) -> int:
        return 0

    def __exit__(self, *error: object) -> None:
        return None


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
            part = ((word >> _u32(index % each * plane)) & _u32(mask)) << _u32(done)
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
            return _i32(m.format.zero_point)
        bits, held = m.format.bits, self.constants[2]
        if self.in_tail:
            bit = (group * m.tail + self.lane) * bits
            first = self.block * (m.groups * 2 * bits) + tirx.floordiv(bit, 8)
            low, high = held[0, first], held[0, tirx.min(first + 1, m.zeros_nbytes - 1)]
            word = cast(low, "uint32") | (cast(high, "uint32") << _u32(8))
            shifted = word >> cast(tirx.floormod(bit, 8), "uint32")
            return cast(shifted & _u32((1 << bits) - 1), "int32")
        start, found, done = (self.block * m.groups + group) * (2 * bits), _u32(0), 0
        for plane in PLANES[bits]:
            bit = self.lane * plane
            byte = held[self.which, start + 2 * done + tirx.floordiv(bit, 8)]
            part = cast(byte, "uint32") >> cast(tirx.floormod(bit, 8), "uint32")
            found = found | ((part & _u32((1 << plane) - 1)) << _u32(done))
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
    return code * ((word << _i32(24 - 8 * byte)) >> _i32(24))


def code_of(word: Expr, byte: int) -> Expr:
    """One code of four, int32."""
    return cast((word >> _u32(8 * byte)) & _u32(255), "int32")


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


def _u32(value: int) -> Expr:
    return tirx.const(value, "uint32")


def _i32(value: int) -> Expr:
    return tirx.const(value, "int32")
