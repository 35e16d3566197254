"""From a graph of codes to a `.pte` for an Ethos-U: ExecuTorch's Arm backend to TOSA, then Vela.

ExecuTorch takes nodes that its own quantizer has marked; the graph here brings its pairs, and is
marked whole. What Vela compiles is the very TOSA that is written beside the `.pte`.
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
from lfmc.machine.quiet import no_output, quiet
from lfmc.targets.ethos_u.accelerators import Accelerator
from lfmc.targets.npu.qdq_pairs import Coding, Pairs

# TOSA has signed codes; those of 16 bits have no zero points.
CODING = Coding({8: torch.int8, 16: torch.int16}, signed=True)
MARK = "_arm_annotation_info"
# Columns of Vela's summary, and what they are here: cycles and bytes are estimates of a compiler.
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
    """`tosa` gives results in an order of its own: `places` of the graph's outputs among them, -1
    for what is an input. `report` is Vela's."""

    pte: bytes
    tosa: bytes
    places: tuple[int, ...]
    report: Mapping[str, float]


def compile_graph(pairs: Pairs, accelerator: Accelerator) -> Compiled:
    """Compile a graph of codes, all of it for the NPU; `UnsupportedError` where it is not taken."""
    with quiet("executorch"), no_output(), tempfile.TemporaryDirectory() as place:
        from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner

        spec = EthosUCompileSpec(
            accelerator.name, system_config=accelerator.system, memory_mode=accelerator.memory
        )
        spec.dump_intermediate_artifacts_to(place)
        program, places = _lowered(pairs, EthosUPartitioner(spec), accelerator.name)
        tosa = (Path(place) / "out.tosa").read_bytes()  # as Vela was given it
        return Compiled(program, tosa, places, _report(Path(place)))


def tosa_of(pairs: Pairs, accelerator: Accelerator) -> tuple[bytes, tuple[int, ...]]:
    """The TOSA alone, and the places of the graph's outputs among its results."""
    with quiet("executorch"), no_output(), tempfile.TemporaryDirectory() as place:
        from executorch.backends.arm.ethosu import EthosUCompileSpec
        from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec
        from executorch.backends.arm.tosa.partitioner import TOSAPartitioner

        spec = TosaCompileSpec(EthosUCompileSpec(accelerator.name).tosa_spec)
        spec.dump_intermediate_artifacts_to(place)
        _, places = _lowered(pairs, TOSAPartitioner(spec), accelerator.name)
        (found,) = Path(place).glob("*.tosa")
        return found.read_bytes(), places


def _lowered(pairs: Pairs, partitioner: Any, name: str) -> tuple[bytes, tuple[int, ...]]:
    from executorch.exir import to_edge_transform_and_lower

    for node in pairs.module.graph.nodes:
        if node.op == "call_function":
            node.meta.setdefault("custom", {})[MARK] = {"quantized": True}
    try:
        exported = torch.export.export(pairs.module, pairs.example, strict=False)
        edge = to_edge_transform_and_lower(exported, partitioner=[partitioner])
    except Exception as error:  # of passes, wrapped in plain ones
        raise UnsupportedError(
            f"the graph can't be compiled for {name}", got=first_line(_cause(error))
        ) from error
    graph = edge.exported_program().graph
    calls = [n for n in graph.nodes if n.op == "call_function"]
    outside = sorted({str(n.target) for n in calls if "getitem" not in str(n.target)})
    if outside != ["executorch_call_delegate"]:
        raise UnsupportedError(f"{name} does not take every operator", got=", ".join(outside))
    (delegate,) = (n for n in calls if "delegate" in str(n.target))
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if list(delegate.args[1:]) != inputs[-len(pairs.example) :]:
        raise UnsupportedError("the compiled graph takes its inputs in another order")
    outputs: Any = graph.output_node().args[0]
    places = tuple(int(own.args[1]) if own in calls else -1 for own in outputs)
    return edge.to_executorch().buffer, places


def _cause(error: BaseException) -> BaseException:
    """What an error began with."""
    return _cause(error.__cause__) if error.__cause__ else error


def _report(folder: Path) -> dict[str, float]:
    """Of Vela's summary: cycles, seconds, and bytes of every memory."""
    (found,) = folder.rglob("*summary*.csv")
    with found.open(newline="") as file:
        (row,) = csv.DictReader(file)
    used = {f"{memory}_nbytes": float(row[f"{memory}_memory_used"]) * 1024 for memory in MEMORIES}
    return {own: float(row[name]) for name, own in REPORT.items()} | used
