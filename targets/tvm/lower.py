"""Lower the fused program to Relax functions over lfmc's kernels.

Every function takes `tokens` int32 `[T]`, `start` int32 `[1]` (the position of the first token),
all states and all parameters, and writes the states in place. `decode` is for one token. `prefill`
returns the logits of the last of several tokens, `score` the logits of all. The functions with the
suffix `_exact` leave activations float: for parity, and for apps that prefer float activations.
`check` computes nothing and checks the shapes of its inputs; the other functions do not check
shapes, so a host calls `check` once.
"""

from __future__ import annotations

from dataclasses import replace

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.tvm.gpus import Gpu
from lfmc.targets.tvm.kernels.cpus import Cpu
from lfmc.targets.tvm.library import Library
from lfmc.targets.tvm.operators import HANDLERS
from lfmc.targets.tvm.relax_function import FunctionBuilder, FunctionSpec

FUNCTIONS = (
    FunctionSpec("decode", 1),
    FunctionSpec("prefill", None, last_only=True),
    FunctionSpec("score", None),
    FunctionSpec("decode_exact", 1, exact=True),
    FunctionSpec("score_exact", None, exact=True),
)


# GPU kernels do not round activations.
GPU_FUNCTIONS = tuple(replace(spec, exact=True) for spec in FUNCTIONS if not spec.exact)


class Lowering:
    """All functions of a library, and the nodes of n-bit operators that each function computes."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, device: Cpu | Gpu
    ) -> None:
        self.library = Library(program, weights, context, device)
        self.functions = GPU_FUNCTIONS if isinstance(device, Gpu) else FUNCTIONS
        self.operators: dict[str, list[tuple[str, str]]] = {}
        for spec in self.functions:
            function = FunctionBuilder(self.library, spec, HANDLERS)
            self.operators[spec.name] = function.operators
        function.add_check()
