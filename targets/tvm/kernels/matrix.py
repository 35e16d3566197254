"""N-bit matrices and activations as kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from lfmc.calib_free.grid.formats import Format
from lfmc.targets.shared.row_blocks import ROWS
from lfmc.targets.tvm.kernels.builder import Buffer, Expr, Parameter, dimension
from lfmc.targets.tvm.kernels.layout import COLUMNS


@dataclass(frozen=True)
class Matrix:
    """An n-bit matrix of a kernel: `count` matrices, one behind the other, for experts.

    Sizes are constants, or known only when the kernel is called: one kernel for matrices of all
    sizes is as fast, and keeps the library small. `tail` is the number of rows behind the whole
    blocks of 16.
    """

    format: Format
    rows: Expr
    columns: Expr
    groups: Expr
    tail: int
    count: Expr = 1

    @property
    def chunks(self) -> int:
        """The number of pieces of 32 columns in a group."""
        return self.format.group // COLUMNS

    @property
    def blocks(self) -> Expr:
        """The number of whole blocks of rows."""
        return _floordiv(self.rows, ROWS)

    @property
    def words(self) -> Expr:
        """The number of 32-bit words of the codes of a row."""
        return _floordiv(self.columns, 32) * self.format.bits

    @property
    def zeros_nbytes(self) -> Expr:
        """The bytes of the zero points of one matrix."""
        return _floordiv(self.rows * self.groups * self.format.bits + 7, 8)

    def parameters(self, name: str) -> list[Parameter]:
        """Return the kernel parameters of the matrix: codes, scales and, unless the format is
        symmetric, zero points."""
        parameters: list[Parameter] = [
            (f"{name}_codes", (self.count, self.rows * self.words), "uint32"),
            (f"{name}_scales", (self.count, self.rows * self.groups), "float16"),
        ]
        if not self.format.symmetric:
            parameters.append((f"{name}_zeros", (self.count, self.zeros_nbytes), "uint8"))
        return parameters


def _floordiv(size: Expr, divisor: int) -> Expr:
    return size // divisor if isinstance(size, int) else tirx.floordiv(size, divisor)


@dataclass(frozen=True)
class Activations:
    """The activations of a product: rows rounded to int8 in the groups of the matrix (words of four
    `[T, K / 4]`, steps `[T, G]`, sums int32 `[T, G]`), or, for parity, floats `[T, K]`."""

    buffers: tuple[Buffer, ...]

    @staticmethod
    def parameters(matrix: Matrix, tokens: Expr, exact: bool) -> list[Parameter]:
        """Return the kernel parameters of the activations; `exact` selects floats."""
        if exact:
            return [("x", (tokens, matrix.columns), "float32")]
        return [
            ("x", (tokens, _floordiv(matrix.columns, 4)), "int32"),
            ("x_steps", (tokens, matrix.groups), "float32"),
            ("x_sums", (tokens, matrix.groups), "int32"),
        ]


def dynamic_matrix(format: Format, tail: int, *, exact: bool, count: Expr = 1) -> Matrix:
    """Return a matrix whose sizes are known only when the kernel is called."""
    if exact:
        columns = dimension("K")
        groups = tirx.floordiv(columns, format.group)
    else:
        groups = dimension("G")
        columns = groups * format.group
    return Matrix(format, dimension("N"), columns, groups, tail, count)
