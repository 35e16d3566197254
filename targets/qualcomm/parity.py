"""Values that the artifact's graphs keep, by ONNX Runtime or ExecuTorch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung
from lfmc.targets.npu.bundle import HOST_FILE, graph_name, steps_of, style_of
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.parity import SAME, Kept, operators_rung, same_outputs
from lfmc.targets.npu.qdq_pairs import paired
from lfmc.targets.npu.static_ranges import Step
from lfmc.targets.qualcomm.delegate import CODING, compile_graph, open_pte
from lfmc.targets.qualcomm.qdq import kept_name, probed
from lfmc.targets.qualcomm.runtime import COMPILED, SOURCE, shipped_graph
from lfmc.targets.qualcomm.session import open_session, run
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters

# Steps of a result that an operator may be off by. On a CPU, one. QNN rounds in places of its own:
# of 65536 steps up to 82 measured, products with 4-bit weights (docs/qualcomm.md); of 256 two.
EDGE = 1.0
ALLOWED = {16: 128.0, 8: 2.0}


def rungs(program: Program, folder: Path) -> tuple[Rung, ...]:
    """Every operator of the artifact in a folder; where its graphs had to be made again for that,
    also that these are the same."""
    facts = open_parameters(folder, HOST_FILE).facts
    compiled = facts["stage"] == "context"
    same: list[CaseResult] = []

    def probe(interface: Interface, inputs: Mapping[str, Tensor]) -> Kept:
        if compiled and facts["runtime"] == "executorch":
            kept, outputs = _by_executorch(program, folder, interface, inputs)
            shipped = shipped_graph(folder, interface)(inputs)
            ours = [shipped[name] for name in interface.outputs]
            same.append(same_outputs(graph_name(interface.tokens), ours, outputs))
            return kept
        return _by_onnxruntime(folder, interface, inputs)

    def allowed(name: str, step: Step) -> float:
        return ALLOWED[step.bits] if compiled else EDGE

    operators = operators_rung(program, folder, probe, allowed)
    return (Rung(3, SAME, 0.0, tuple(same)), operators) if same else (operators,)


def _by_onnxruntime(folder: Path, interface: Interface, inputs: Mapping[str, Tensor]) -> Kept:
    facts = open_parameters(folder, HOST_FILE).facts
    source, kept = folder / SOURCE.format(graph_name(interface.tokens)), facts["kept"]
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(folder / PARAMETERS, place)  # ONNX Runtime takes no link
        path = Path(place) / source.name
        ir.save(probed(source, len(kept)), path)
        soc = SOCS[facts["soc"]] if facts["stage"] == "context" else None
        made = run(open_session(path, soc), inputs)
    made.setdefault(kept_name(len(kept) - 1), made["logits"])  # an output, which has its name
    return [(name, made[kept_name(index)]) for index, name in enumerate(kept)]


def _by_executorch(
    program: Program, folder: Path, interface: Interface, inputs: Mapping[str, Tensor]
) -> tuple[Kept, list[Tensor]]:
    """The same but for constants, which no delegate gives; and the graph's outputs."""
    held = open_parameters(folder, HOST_FILE)
    steps, soc, own = steps_of(held), SOCS[held.facts["soc"]], open_parameters(folder)
    pairs = paired(program, interface, steps, own, CODING, style_of(held), probed=True)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / COMPILED["executorch"].format("probed")
        compile_graph(pairs, soc, path, halves=False)
        places = list(map(str, range(len(pairs.kept))))
        made = open_pte(path, list(interface.inputs), [*interface.outputs, *places])(inputs)
    kept = [(name, made[place]) for name, place in zip(pairs.kept, places, strict=True)]
    return kept, [made[name] for name in interface.outputs]
