"""What the Relax functions of one library share: kernels, constants, and the module they are in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import IRModule, relax

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.shared.parameters_file import Parameter
from lfmc.targets.tvm.constants import TvmConstants
from lfmc.targets.tvm.gpus import Gpu
from lfmc.targets.tvm.kernel_sets import CPU, GPU
from lfmc.targets.tvm.kernels.builder import halves
from lfmc.targets.tvm.kernels.cpus import Cpu


class Library:
    """Kernels and constants of one library; each is written once for all of its functions."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, device: Cpu | Gpu
    ) -> None:
        self.program, self.context, self.device = program, context, device
        self.kernels = GPU if isinstance(device, Gpu) else CPU
        self.constants = TvmConstants(weights)
        self.builder = relax.BlockBuilder()
        self._halves = not (isinstance(device, Gpu) and device.kind == "opencl")
        self._kernels: dict[Any, Any] = {}

    @property
    def module(self) -> IRModule:
        return self.builder.get()

    @property
    def parameters(self) -> list[Parameter]:
        """In the order in which functions take them."""
        return list(self.constants.parameters.values())

    def kernel(self, make: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """A kernel, made once for the same numbers."""
        key = (make.__name__, args, tuple(sorted(named.items())))
        if key not in self._kernels:
            name = f"{make.__name__}_{len(self._kernels)}"
            with halves(self._halves):
                self._kernels[key] = self.builder.add_func(make(*args, **named), name)
        return self._kernels[key]
