"""N-bit matrices as kernels take them, and what they are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from lfmc.calib_free.grid.formats import Format
from lfmc.targets.shared.row_blocks import ROWS
from lfmc.targets.tvm.kernels.builder import Buffer, Expr, Parameter, dimension
from lfmc.targets.tvm.kernels.layout import COLUMNS


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
