"""The fused program as a module of functions in one of MLIR's dialects."""

from __future__ import annotations

from typing import Any

from torch_mlir.extras.fx_decomp_util import get_decomposition_table

from lfmc.program import Program
from lfmc.targets.mlir.arithmetic import ByFloats, ByShifts, Dialect
from lfmc.targets.mlir.constants import MlirConstants
from lfmc.targets.mlir.devices import Device
from lfmc.targets.mlir.dialects import module_of
from lfmc.targets.mlir.graphs import PREPARE, Graphs
from lfmc.weights import PlannedWeights


def arithmetic(dialect: str, device: Device) -> Dialect:
    """The forms that a dialect and a device take.

    IREE's code for Vulkan loses what it writes into slices, and some of what it adds up.
    """
    careful = device.driver == "vulkan"
    if dialect in ("linalg", "torch"):
        return ByShifts(slices=device.is_cpu, sums=not careful)
    return ByFloats("int8" if dialect == "tosa" else "uint8", sums=not careful)


class Lowering:
    """Functions for calls of one token, a few, and `chunk`, and the parameters that they take."""

    def __init__(
        self,
        program: Program,
        weights: PlannedWeights,
        chunk: int,
        dialect: str,
        device: Device,
    ) -> None:
        self.constants, self._dialect = MlirConstants(weights), dialect
        table = get_decomposition_table()
        forms = arithmetic(dialect, device)
        self.graphs = Graphs(program, self.constants, chunk, forms, table, halves=device.halves)

    def module(self) -> Any:
        """The module; parameters are arguments of its functions."""
        graphs = {kind.name: self.graphs.graph(kind) for kind in self.graphs.kinds}
        if self.graphs.packed:
            graphs[PREPARE] = self.graphs.prepare()
        return module_of(graphs, self._dialect)
