"""Compare the operators of an artifact with torch, in ONNX Runtime or ExecuTorch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung
from lfmc.targets.npu.bundle import HOST_FILE, graph_name, read_steps, read_style
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.parity import SAME_GRAPHS_TITLE, NamedValues, compare_outputs, operators_rung
from lfmc.targets.npu.qdq_pairs import build_qdq_graph
from lfmc.targets.npu.static_ranges import Step
from lfmc.targets.qualcomm.delegate import CODING, compile_graph, open_pte
from lfmc.targets.qualcomm.qdq import expose_values, value_name
from lfmc.targets.qualcomm.runtime import COMPILED, SOURCE, shipped_graph
from lfmc.targets.qualcomm.session import open_session, run
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters

# Tolerances in steps of the result. A CPU differs by at most one. QNN also rounds inside operators:
# the largest difference measured is 82 of 65536 steps, in products with 4-bit weights
# (docs/qualcomm.md), and 2 of 256 steps.
CPU_TOLERANCE = 1.0
QNN_TOLERANCE = {16: 128.0, 8: 2.0}


def rungs(program: Program, folder: Path) -> tuple[Rung, ...]:
    """Compare every operator of the artifact in a folder with torch.

    If the graphs are compiled again to expose their values, a first rung compares their outputs
    with those of the artifact's graphs.
    """
    facts = open_parameters(folder, HOST_FILE).facts
    compiled = facts["stage"] == "context"
    same_graphs: list[CaseResult] = []

    def probe(interface: Interface, inputs: Mapping[str, Tensor]) -> NamedValues:
        if compiled and facts["runtime"] == "executorch":
            values, outputs = _run_executorch(program, folder, interface, inputs)
            shipped = shipped_graph(folder, interface)(inputs)
            shipped_outputs = [shipped[name] for name in interface.outputs]
            name = graph_name(interface.tokens)
            same_graphs.append(compare_outputs(name, shipped_outputs, outputs))
            return values
        return _run_onnxruntime(folder, interface, inputs)

    def tolerance(name: str, step: Step) -> float:
        return QNN_TOLERANCE[step.bits] if compiled else CPU_TOLERANCE

    operators = operators_rung(program, folder, probe, tolerance)
    if not same_graphs:
        return (operators,)
    return Rung(3, SAME_GRAPHS_TITLE, 0.0, tuple(same_graphs)), operators


def _run_onnxruntime(
    folder: Path, interface: Interface, inputs: Mapping[str, Tensor]
) -> NamedValues:
    facts = open_parameters(folder, HOST_FILE).facts
    source, names = folder / SOURCE.format(graph_name(interface.tokens)), facts["kept"]
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copy(folder / PARAMETERS, temporary)  # ONNX Runtime rejects links
        path = Path(temporary) / source.name
        ir.save(expose_values(source, len(names)), path)
        soc = SOCS[facts["soc"]] if facts["stage"] == "context" else None
        results = run(open_session(path, soc), inputs)
    # The last value is an output of the model and has its name.
    results.setdefault(value_name(len(names) - 1), results["logits"])
    return [(name, results[value_name(index)]) for index, name in enumerate(names)]


def _run_executorch(
    program: Program, folder: Path, interface: Interface, inputs: Mapping[str, Tensor]
) -> tuple[NamedValues, list[Tensor]]:
    """Return the values without constants, which a delegate can't return, and the outputs."""
    host_file = open_parameters(folder, HOST_FILE)
    steps, soc = read_steps(host_file), SOCS[host_file.facts["soc"]]
    file, style = open_parameters(folder), read_style(host_file)
    graph = build_qdq_graph(program, interface, steps, file, CODING, style, expose_values=True)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / COMPILED["executorch"].format("probed")
        compile_graph(graph, soc, path, float16=False)
        keys = list(map(str, range(len(graph.value_names))))
        results = open_pte(path, list(interface.inputs), [*interface.outputs, *keys])(inputs)
    values = [(name, results[key]) for name, key in zip(graph.value_names, keys, strict=True)]
    return values, [results[name] for name in interface.outputs]
