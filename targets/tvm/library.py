"""The kernels, the constants and the module that the functions of one library share."""

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
from lfmc.targets.tvm.kernels.builder import float16_values
from lfmc.targets.tvm.kernels.cpus import Cpu


class Library:
    """The kernels and constants of one library, which all of its functions share."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, device: Cpu | Gpu
    ) -> None:
        self.program, self.context, self.device = program, context, device
        self.kernels = GPU if isinstance(device, Gpu) else CPU
        self.constants = TvmConstants(weights)
        self.builder = relax.BlockBuilder()
        self._float16 = not (isinstance(device, Gpu) and device.kind == "opencl")
        self._kernels: dict[Any, Any] = {}

    @property
    def module(self) -> IRModule:
        """The module built so far."""
        return self.builder.get()

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters, in the order in which functions take them."""
        return list(self.constants.parameters.values())

    def kernel(self, build: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return the kernel for some arguments; build it if the library lacks it."""
        key = (build.__name__, args, tuple(sorted(options.items())))
        if key not in self._kernels:
            name = f"{build.__name__}_{len(self._kernels)}"
            with float16_values(self._float16):
                self._kernels[key] = self.builder.add_func(build(*args, **options), name)
        return self._kernels[key]
