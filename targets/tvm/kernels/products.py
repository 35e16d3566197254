"""Products of a block of 16 rows of an n-bit matrix with some tokens, vector by vector.

See `lfmc.targets.tvm.kernels.layout` for how codes, scales and zero points lie.
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
    bind,
    cast,
    floats,
    local,
    prefetch,
    put,
    vector,
    wide,
)
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.kernels.dot import Products
from lfmc.targets.tvm.kernels.layout import COLUMNS
from lfmc.targets.tvm.kernels.matrix import Activations, Matrix


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
