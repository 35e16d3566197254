"""The fused program as Relax functions over lfmc's kernels.

Every function takes `tokens` int32 `[T]`, `start` int32 `[1]` (the position of the first), all
states and all parameters, and writes the states in place. `decode` is for one token, `prefill`
gives logits of the last of several, `score` of all. The same with `_exact` behind their names
leave activations float: for parity, and for apps that want it. `check` computes nothing; a host
calls it once, as the others do not look at the shapes of what they are given.
"""

from __future__ import annotations

from dataclasses import replace

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.tvm.gpus import Gpu
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.library import Library
from lfmc.targets.tvm.operators import HANDLERS
from lfmc.targets.tvm.relax_function import Kind, Walk

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
    """All functions of a library, and the nodes of n-bit operators that each computes."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, device: Cpu | Gpu
    ) -> None:
        self.library = Library(program, weights, context, device)
        self.kinds = GPU_KINDS if isinstance(device, Gpu) else KINDS
        self.operators: dict[str, list[tuple[str, str]]] = {}
        for kind in self.kinds:
            walk = Walk(self.library, kind, HANDLERS)
            self.operators[kind.name] = walk.operators
        walk.check()
