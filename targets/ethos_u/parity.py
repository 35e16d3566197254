"""Compare the operators of an artifact with torch, in TOSA's reference model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung
from lfmc.targets.ethos_u.accelerators import ACCELERATORS
from lfmc.targets.ethos_u.compile import CODING, lower_to_tosa
from lfmc.targets.ethos_u.runtime import run_tosa, shipped_graph
from lfmc.targets.npu.bundle import HOST_FILE, graph_name, read_steps, read_style
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import PARTS_BY_TABLE, SIGMOID
from lfmc.targets.npu.parity import SAME_GRAPHS_TITLE, NamedValues, compare_outputs, operators_rung
from lfmc.targets.npu.qdq_pairs import build_qdq_graph
from lfmc.targets.npu.static_ranges import Step
from lfmc.targets.shared.parameters_file import open_parameters

# Tolerances in steps of the result. TOSA's functions are tables: an 8-bit table has every value. A
# 16-bit table has 513 entries with linear interpolation: differences of 27 steps were measured.
TOLERANCE, INTERPOLATION_TOLERANCE = 1.0, 64.0
FUNCTIONS = (SIGMOID, *PARTS_BY_TABLE)


def rungs(program: Program, folder: Path) -> tuple[Rung, Rung]:
    """Compare every operator of the artifact in a folder with torch.

    The artifact's graphs do not expose their values, so the operators are compared in graphs that
    do. The first rung compares the outputs of these graphs with those of the artifact's graphs.
    """
    host_file = open_parameters(folder, HOST_FILE)
    steps, style, file = read_steps(host_file), read_style(host_file), open_parameters(folder)
    accelerator = ACCELERATORS[host_file.facts["accelerator"]]
    same_graphs: list[CaseResult] = []

    def probe(interface: Interface, inputs: Mapping[str, Tensor]) -> NamedValues:
        graph = build_qdq_graph(
            program, interface, steps, file, CODING, style, expose_values=True, coded=True
        )
        tosa, places = lower_to_tosa(graph, accelerator)
        input_codes = [CODING.codes(inputs[name], steps[name]) for name in interface.inputs]
        outputs = len(interface.outputs)
        value_places = [
            (name, place)
            for name, place in zip(graph.value_names, places[outputs:], strict=True)
            if place >= 0
        ]
        result_places = [*places[:outputs], *(place for _, place in value_places)]
        results = run_tosa(tosa, result_places)(input_codes)
        shipped, name = shipped_graph(folder, interface.tokens), graph_name(interface.tokens)
        same_graphs.append(compare_outputs(name, shipped(input_codes), results[:outputs]))
        return [
            (name, CODING.values(codes, steps[name]))
            for (name, _), codes in zip(value_places, results[outputs:], strict=True)
        ]

    def tolerance(name: str, step: Step) -> float:
        interpolated = step.bits == 16 and name.endswith(FUNCTIONS)
        return INTERPOLATION_TOLERANCE if interpolated else TOLERANCE

    operators = operators_rung(program, folder, probe, tolerance)
    return Rung(3, SAME_GRAPHS_TITLE, 0.0, tuple(same_graphs)), operators
