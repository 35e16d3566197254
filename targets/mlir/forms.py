"""The context of the handlers that write a program's operators in plain torch.

Values are float32 `[1, T, width]`, as in the program. States are filters `[taps - 1, H]`, keys
`[K, D, C]` and values `[K, C, D]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lfmc.graph.program import Program
from lfmc.targets.mlir.arithmetic import Arithmetic
from lfmc.targets.mlir.constants import Matrix, MlirConstants
from lfmc.targets.mlir.named import LoadParameter
from lfmc.targets.shared.plain_torch import ConstantRef


@dataclass(frozen=True)
class Forms:
    """The program and its constants; `load` returns the tensor of a parameter."""

    program: Program
    constants: MlirConstants
    load: LoadParameter
    arithmetic: Arithmetic

    def floats(self, constant: ConstantRef, *, taps: bool = False) -> Tensor:
        """Return a float constant in float32."""
        parameter = self.constants.floats(constant.sources, taps=taps)
        return self.widen(self.load(parameter), parameter.dtype)

    def widen(self, value: Tensor, dtype: str) -> Tensor:
        """Convert a float parameter to float32."""
        if dtype not in ("float16", "bfloat16"):
            return value

        def table(name: str, make: Callable[[], Tensor]) -> Tensor:
            return self.load(self.constants.config_constant(name, make))

        return self.arithmetic.widen_halves(value, dtype, table)

    def add_bias(self, value: Tensor, bias: ConstantRef | None) -> Tensor:
        """Return `value` plus a bias, if there is one."""
        return value if bias is None else value + self.floats(bias)

    def zero_points(self, matrix: Matrix) -> Tensor | None:
        """Return the zero points that `prepare` unpacked, `[..., G, 16]`."""
        return None if matrix.zeros is None else self.load(matrix.zeros)
