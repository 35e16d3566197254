"""What the forms of a program's operators, in plain torch, share.

Values are float32 `[1, T, width]` as in the program; states are `[taps - 1, H]` of a filter, keys
`[K, D, C]`, values `[K, C, D]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lfmc.graph.program import Program
from lfmc.targets.mlir.arithmetic import Dialect
from lfmc.targets.mlir.constants import Matrix, MlirConstants
from lfmc.targets.mlir.named import Given
from lfmc.targets.shared.plain_torch import Held


@dataclass(frozen=True)
class Forms:
    """What the forms of operators share: the program, and parameters that `given` supplies."""

    program: Program
    constants: MlirConstants
    given: Given
    dialect: Dialect

    def floats(self, held: Held, *, taps: bool = False) -> Tensor:
        """A constant that stays float, in float32."""
        own = self.constants.floats(held.sources, taps=taps)
        return self.wide(self.given(own), own.dtype)

    def wide(self, value: Tensor, dtype: str) -> Tensor:
        """Float32 of a parameter of floats."""
        if dtype not in ("float16", "bfloat16"):
            return value

        def table(name: str, make: Callable[[], Tensor]) -> Tensor:
            return self.given(self.constants.of_config(name, make))

        return self.dialect.halves(value, dtype, table)

    def biased(self, value: Tensor, bias: Held | None) -> Tensor:
        """`value` and a bias, where there is one."""
        return value if bias is None else value + self.floats(bias)

    def zeros(self, matrix: Matrix) -> Tensor | None:
        """Zero points as `prepare` left them, `[..., G, 16]`."""
        return None if matrix.zeros is None else self.given(matrix.zeros)
