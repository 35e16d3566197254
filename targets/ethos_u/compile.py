"""Compile a graph of codes into a `.pte` for an Ethos-U: ExecuTorch's Arm backend, then Vela.

ExecuTorch's backend lowers to TOSA the nodes that its quantizer marked. The graph here already has
its quantize and dequantize pairs, so every node is marked. The bundle contains the same TOSA that
Vela compiles.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lfmc.errors import UnsupportedError, first_line
from lfmc.machine.quiet import quiet, silence_stdout
from lfmc.targets.ethos_u.accelerators import Accelerator
from lfmc.targets.npu.qdq_pairs import Coding, QdqGraph

# TOSA's codes are signed. 16-bit codes have no zero point.
CODING = Coding({8: torch.int8, 16: torch.int16}, signed=True)
MARK = "_arm_annotation_info"
# Columns of Vela's summary, and their names in the report. They are the compiler's estimates.
REPORT = {
    "cycles_total": "cycles",
    "cycles_npu": "npu_cycles",
    "inference_time": "seconds",
    "nn_macs": "macs",
    "total_npu_encoded_weights": "encoded_weights_nbytes",
}
MEMORIES = ("sram", "dram", "on_chip_flash", "off_chip_flash")


@dataclass(frozen=True)
class Compiled:
    """A compiled graph.

    The results of `tosa` have another order than the graph's outputs: `places` are the outputs'
    positions among the results, or -1 for an output that is an input. `report` is from Vela's
    summary.
    """

    pte: bytes
    tosa: bytes
    places: tuple[int, ...]
    report: Mapping[str, float]


def compile_graph(graph: QdqGraph, accelerator: Accelerator) -> Compiled:
    """Compile a graph of codes for the NPU, as one delegate.

    Raises `UnsupportedError` if the NPU does not support every operator.
    """
    with quiet("executorch"), silence_stdout(), tempfile.TemporaryDirectory() as folder:
        from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner

        spec = EthosUCompileSpec(
            accelerator.name, system_config=accelerator.system, memory_mode=accelerator.memory
        )
        spec.dump_intermediate_artifacts_to(folder)
        pte, places = _lower(graph, EthosUPartitioner(spec), accelerator.name)
        tosa = (Path(folder) / "out.tosa").read_bytes()  # the input of Vela
        return Compiled(pte, tosa, places, _read_report(Path(folder)))


def lower_to_tosa(graph: QdqGraph, accelerator: Accelerator) -> tuple[bytes, tuple[int, ...]]:
    """Return the TOSA of a graph, and the positions of the graph's outputs among its results."""
    with quiet("executorch"), silence_stdout(), tempfile.TemporaryDirectory() as folder:
        from executorch.backends.arm.ethosu import EthosUCompileSpec
        from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec
        from executorch.backends.arm.tosa.partitioner import TOSAPartitioner

        spec = TosaCompileSpec(EthosUCompileSpec(accelerator.name).tosa_spec)
        spec.dump_intermediate_artifacts_to(folder)
        _, places = _lower(graph, TOSAPartitioner(spec), accelerator.name)
        (path,) = Path(folder).glob("*.tosa")
        return path.read_bytes(), places


def _lower(graph: QdqGraph, partitioner: Any, name: str) -> tuple[bytes, tuple[int, ...]]:
    """Return the `.pte`, and the positions of the graph's outputs in the delegate's results."""
    from executorch.exir import to_edge_transform_and_lower

    for node in graph.module.graph.nodes:
        if node.op == "call_function":
            node.meta.setdefault("custom", {})[MARK] = {"quantized": True}
    try:
        exported = torch.export.export(graph.module, graph.example, strict=False)
        edge = to_edge_transform_and_lower(exported, partitioner=[partitioner])
    except Exception as error:  # from a pass, wrapped in an exception without details
        raise UnsupportedError(
            f"the graph can't be compiled for {name}", got=first_line(_root_cause(error))
        ) from error
    edge_graph = edge.exported_program().graph
    calls = [n for n in edge_graph.nodes if n.op == "call_function"]
    operators = sorted({str(n.target) for n in calls if "getitem" not in str(n.target)})
    if operators != ["executorch_call_delegate"]:
        raise UnsupportedError(f"{name} does not support every operator", got=", ".join(operators))
    (delegate,) = (n for n in calls if "delegate" in str(n.target))
    inputs = [n for n in edge_graph.nodes if n.op == "placeholder"]
    if list(delegate.args[1:]) != inputs[-len(graph.example) :]:
        raise UnsupportedError("the inputs of the compiled graph are in another order")
    outputs: Any = edge_graph.output_node().args[0]
    places = tuple(int(output.args[1]) if output in calls else -1 for output in outputs)
    return edge.to_executorch().buffer, places


def _root_cause(error: BaseException) -> BaseException:
    return _root_cause(error.__cause__) if error.__cause__ else error


def _read_report(folder: Path) -> dict[str, float]:
    """Return cycles, seconds, and bytes of every memory from Vela's summary."""
    (path,) = folder.rglob("*summary*.csv")
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    used = {f"{memory}_nbytes": float(row[f"{memory}_memory_used"]) * 1024 for memory in MEMORIES}
    return {name: float(row[column]) for column, name in REPORT.items()} | used
