"""The fused program as a module of functions in one of MLIR's dialects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch_mlir.extras.fx_decomp_util import get_decomposition_table

from lfmc.program import Program
from lfmc.targets.mlir.arithmetic import ByFloats, ByShifts, Dialect
from lfmc.targets.mlir.constants import MlirConstants
from lfmc.targets.mlir.dialects import module_of
from lfmc.targets.mlir.graphs import PREPARE, Graphs
from lfmc.weights import PlannedWeights

ARITHMETIC: Mapping[str, Dialect] = {
    "linalg": ByShifts(),
    "torch": ByShifts(),
    "stablehlo": ByFloats("uint8"),
    "tosa": ByFloats("int8"),
}


class Lowering:
    """Functions for calls of one token, a few, and `chunk`, and the parameters that they take."""

    def __init__(self, program: Program, weights: PlannedWeights, chunk: int, dialect: str) -> None:
        self.constants, self._dialect = MlirConstants(weights), dialect
        table = get_decomposition_table()
        self.graphs = Graphs(program, self.constants, chunk, ARITHMETIC[dialect], table)

    def module(self) -> Any:
        """The module; parameters are arguments of its functions."""
        graphs = {kind.name: self.graphs.graph(kind) for kind in self.graphs.kinds}
        if self.graphs.packed:
            graphs[PREPARE] = self.graphs.prepare()
        return module_of(graphs, self._dialect)
