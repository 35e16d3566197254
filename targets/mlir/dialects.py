"""Import of graphs of ATen operators to MLIR's dialects, by torch-mlir."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx
from torch_mlir import ir
from torch_mlir.dialects import torch as torch_dialect
from torch_mlir.extras.fx_importer import FxImporter
from torch_mlir.passmanager import PassManager

from lfmc.errors import UnsupportedError, first_line

IMPORT_PIPELINE = "torchdynamo-export-to-torch-backend-pipeline{extra-library=}"
FROM_TORCH: Mapping[str, tuple[str, ...]] = {
    "linalg": ("torch-backend-to-linalg-on-tensors-backend-pipeline",),
    "torch": (),
    "stablehlo": ("torch-backend-to-stablehlo-backend-pipeline",),
    "tosa": ("torch-backend-to-tosa-backend-pipeline",),
}
TO_LINALG: Mapping[str, tuple[str, ...]] = {
    "linalg": (),
    "torch": FROM_TORCH["linalg"],
    "stablehlo": ("stablehlo-legalize-to-linalg",),
    "tosa": ("tosa-to-linalg-pipeline", "func.func(tosa-to-tensor,tosa-to-arith)"),
}


def import_pipelines(dialect: str) -> tuple[str, ...]:
    """Return the pipelines from torch-mlir's import to a dialect."""
    return IMPORT_PIPELINE, *FROM_TORCH[dialect]


def import_graphs(graphs: Mapping[str, fx.GraphModule], passes: Sequence[str]) -> Any:
    """Return a module with one function per graph, lowered by the passes."""
    context = ir.Context()
    torch_dialect.register_dialect(context)
    with ir.Location.unknown(context):
        module = ir.Module.create()
    for name, graph in graphs.items():
        # One at a time: the passes to StableHLO require a module with a single function.
        importer = FxImporter(context=context)
        importer.import_graph_module(graph, func_name=name)
        for pipeline in passes:
            run_passes(importer.module, pipeline)
        for operation in list(importer.module.body.operations):
            operation.detach_from_parent()
            module.body.append(operation)
    return module


def to_linalg(module: Any, dialect: str) -> None:
    """Lower an exported module to linalg, which IREE accepts."""
    for pipeline in TO_LINALG[dialect]:
        run_passes(module, pipeline)


def run_passes(module: Any, pipeline: str) -> None:
    """Run passes on a module; raises `UnsupportedError` with MLIR's message."""
    with module.context as context:
        context.emit_error_diagnostics = True
        try:
            PassManager.parse(f"builtin.module({pipeline})").run(module.operation)
        except ir.MLIRError as error:
            raise UnsupportedError(
                "torch-mlir can't lower the model to this dialect", got=first_line(error)
            ) from error


def write_bytecode(module: Any, path: Path) -> None:
    with path.open("wb") as file:
        module.operation.write_bytecode(file)
