"""The fused program as a module of functions in one of MLIR's dialects."""

from __future__ import annotations

from typing import Any

from torch_mlir.extras.fx_decomp_util import get_decomposition_table

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.mlir.arithmetic import (
    Arithmetic,
    FloatArithmetic,
    ShiftArithmetic,
    WordArithmetic,
)
from lfmc.targets.mlir.constants import MlirConstants
from lfmc.targets.mlir.devices import Device
from lfmc.targets.mlir.dialects import import_graphs, import_pipelines, to_linalg
from lfmc.targets.mlir.graphs import PREPARE, Graphs
from lfmc.targets.mlir.named import NamedOperators, inline, publish_operators


def choose_arithmetic(dialect: str, device: Device) -> Arithmetic:
    """Return the arithmetic that a dialect and a device support.

    On devices other than CPUs, IREE writes slices to wrong places (Vulkan), and computes some sums
    over codes wrongly (Vulkan, and CUDA, which shares its code generator with HIP).
    """
    if device.words:
        return WordArithmetic()
    if dialect in ("linalg", "torch"):
        return ShiftArithmetic(slices=device.is_cpu, sums=device.is_cpu)
    return FloatArithmetic("int8" if dialect == "tosa" else "uint8", sums=device.is_cpu)


class Lowering:
    """Functions for calls of one token, of a few tokens and of `chunk`, and their parameters."""

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
        self._named = NamedOperators() if named else None
        decompositions = get_decomposition_table()
        arithmetic = choose_arithmetic(dialect, device)
        self.graphs = Graphs(
            program, self.constants, chunk, arithmetic, decompositions, self._named
        )

    def module(self) -> Any:
        """Return the module to export; its functions take the parameters as arguments."""
        graphs = {function.name: self.graphs.graph(function) for function in self.graphs.functions}
        if self.graphs.packed:
            graphs[PREPARE] = self.graphs.prepare()
        if self._named is None:
            return import_graphs(graphs, import_pipelines(self._dialect))
        module = import_graphs(graphs | self.graphs.definitions(), ())
        publish_operators(module, self._named.definitions)
        return module

    def to_linalg(self, module: Any) -> None:
        """Lower the module to linalg, which IREE accepts."""
        if self._named is not None:
            inline(module)
        to_linalg(module, self._dialect)
