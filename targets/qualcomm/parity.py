"""Values that the artifact's graphs keep, by ONNX Runtime or ExecuTorch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from lfmc.parity import Rung
from lfmc.program import Program
from lfmc.targets.npu.bundle import HOST_FILE, graph_name, steps_of, style_of
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.pairs import paired
from lfmc.targets.npu.parity import CONSTANTS, kind_of, operators_rung
from lfmc.targets.npu.steps import Step
from lfmc.targets.parameters import PARAMETERS, open_parameters
from lfmc.targets.qualcomm.delegate import CODING, compile_graph, open_pte
from lfmc.targets.qualcomm.qdq import kept_name, probed
from lfmc.targets.qualcomm.runtime import COMPILED, SOURCE
from lfmc.targets.qualcomm.session import open_session, run
from lfmc.targets.qualcomm.socs import SOCS

# Steps of a result that an operator may be off by. On a CPU, one. QNN rounds in places of its own:
# of 65536 steps twice what was measured (docs/qualcomm.md), of 256 two.
EDGE = 1.0
ALLOWED = {16: 128.0, 8: 2.0}


def rung(program: Program, folder: Path) -> Rung:
    """Every operator of the artifact in a folder."""
    facts = open_parameters(folder, HOST_FILE).facts
    compiled = facts["stage"] == "context"

    def probe(interface: Interface, inputs: Mapping[str, Tensor]) -> Mapping[int, Tensor]:
        if compiled and facts["runtime"] == "executorch":
            return _by_executorch(program, folder, interface, inputs)
        return _by_onnxruntime(folder, interface, inputs)

    def allowed(step: Step) -> float:
        return ALLOWED[step.bits] if compiled else EDGE

    return operators_rung(program, folder, probe, allowed)


def _by_onnxruntime(
    folder: Path, interface: Interface, inputs: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    facts = open_parameters(folder, HOST_FILE).facts
    source, count = folder / SOURCE.format(graph_name(interface.tokens)), len(facts["kept"])
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(folder / PARAMETERS, place)  # ONNX Runtime takes no link
        path = Path(place) / source.name
        ir.save(probed(source, count), path)
        soc = SOCS[facts["soc"]] if facts["stage"] == "context" else None
        made = run(open_session(path, soc), inputs)
    names = {index: kept_name(index) for index in range(count)}
    found = {index: made[name] for index, name in names.items() if name in made}
    return {count - 1: made["logits"], **found}  # the last is an output, and has its name


def _by_executorch(
    program: Program, folder: Path, interface: Interface, inputs: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """The same but for constants, which no delegate gives."""
    held = open_parameters(folder, HOST_FILE)
    steps, kept, soc = steps_of(held), held.facts["kept"], SOCS[held.facts["soc"]]
    own = open_parameters(folder)
    pairs = paired(program, interface, steps, own, CODING, style_of(held), probed=True)
    places = [index for index, name in enumerate(kept) if kind_of(name) != CONSTANTS]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / COMPILED["executorch"].format("probed")
        compile_graph(pairs, soc, path, halves=False)
        names = [*interface.outputs, *map(str, places)]
        made = open_pte(path, list(interface.inputs), names)(inputs)
    return {index: made[str(index)] for index in places}
