"""The fused program as Relax functions over lfmc's kernels.

Every function takes `tokens` int32 `[T]`, `start` int32 `[1]` (the position of the first), all
states and all parameters, and writes the states in place. `decode` is for one token, `prefill`
gives logits of the last of several, `score` of all. The same with `_exact` behind their names
leave activations float: for parity, and for apps that want it. `check` computes nothing; a host
calls it once, as the others do not look at the shapes of what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import IRModule, relax

from lfmc.program import Program
from lfmc.targets.parameters import Parameter
from lfmc.targets.tvm.constants import TvmConstants
from lfmc.targets.tvm.cpus import Cpu
from lfmc.targets.tvm.gpus import Gpu
from lfmc.targets.tvm.kernels.builder import halves
from lfmc.targets.tvm.kernels.sets import CPU, GPU
from lfmc.targets.tvm.operators import HANDLERS
from lfmc.targets.tvm.walk import Kind, Walk
from lfmc.weights import PlannedWeights

KINDS = (
    Kind("decode", 1),
    Kind("prefill", None, last_only=True),
    Kind("score", None),
    Kind("decode_exact", 1, exact=True),
    Kind("score_exact", None, exact=True),
)


# Kernels for GPUs round no activations.
GPU_KINDS = tuple(replace(kind, exact=True) for kind in KINDS if not kind.exact)


class Lowering:
    """All functions, the kernels that they share, and the constants that they take."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, device: Cpu | Gpu
    ) -> None:
        self.program, self.context, self.device = program, context, device
        on_gpu = isinstance(device, Gpu)
        self.kinds, self.kernels = (GPU_KINDS, GPU) if on_gpu else (KINDS, CPU)
        self._halves = not (isinstance(device, Gpu) and device.kind == "opencl")
        self.handlers, self.constants = HANDLERS, TvmConstants(weights)
        self.builder = relax.BlockBuilder()
        self.operators: dict[str, list[tuple[str, str]]] = {}
        self._kernels: dict[Any, Any] = {}
        for kind in self.kinds:
            walk = Walk(self, kind)
            self.operators[kind.name] = walk.operators
        walk.check()

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
