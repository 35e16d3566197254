"""The fused program as a module of functions in one of MLIR's dialects."""

from __future__ import annotations

from typing import Any

from torch_mlir.extras.fx_decomp_util import get_decomposition_table

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.mlir.arithmetic import ByFloats, ByShifts, ByWords, Dialect
from lfmc.targets.mlir.constants import MlirConstants
from lfmc.targets.mlir.devices import Device
from lfmc.targets.mlir.dialects import module_of, pipelines, to_linalg
from lfmc.targets.mlir.graphs import PREPARE, Graphs
from lfmc.targets.mlir.named import Named, inline, show


def arithmetic(dialect: str, device: Device) -> Dialect:
    """The forms that a dialect and a device take.

    Outside of CPUs IREE loses what is written into slices (Vulkan) and gets some sums over codes
    wrong (CUDA, whose code generator is HIP's, and Vulkan).
    """
    if device.words:
        return ByWords()
    if dialect in ("linalg", "torch"):
        return ByShifts(slices=device.is_cpu, sums=device.is_cpu)
    return ByFloats("int8" if dialect == "tosa" else "uint8", sums=device.is_cpu)


class Lowering:
    """Functions for calls of one token, a few, and `chunk`, and the parameters that they take."""

    def __init__(
        self,
        program: Program,
        weights: PlannedWeights,
        chunk: int,
        dialect: str,
        device: Device,
        *,
        named: bool = False,
    ) -> None:
        self.constants, self._dialect = MlirConstants(weights), dialect
        self._named = Named() if named else None
        table = get_decomposition_table()
        forms = arithmetic(dialect, device)
        self.graphs = Graphs(program, self.constants, chunk, forms, table, self._named)

    def module(self) -> Any:
        """The module to ship; parameters are arguments of its functions."""
        graphs = {kind.name: self.graphs.graph(kind) for kind in self.graphs.kinds}
        if self.graphs.packed:
            graphs[PREPARE] = self.graphs.prepare()
        if self._named is None:
            return module_of(graphs, pipelines(self._dialect))
        module = module_of(graphs | self.graphs.definitions(), ())
        show(module, self._named.definitions)
        return module

    def to_linalg(self, module: Any) -> None:
        """Lower that module to what IREE takes."""
        if self._named is not None:
            inline(module)
        to_linalg(module, self._dialect)
