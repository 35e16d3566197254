"""Values that an artifact's graphs keep, by TOSA's reference model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lfmc.graph.program import Program
from lfmc.parity.compare import CaseResult, Rung
from lfmc.targets.ethos_u.accelerators import ACCELERATORS
from lfmc.targets.ethos_u.compile import CODING, tosa_of
from lfmc.targets.ethos_u.runtime import run_tosa, shipped_graph
from lfmc.targets.npu.bundle import HOST_FILE, graph_name, steps_of, style_of
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import PARTS_BY_TABLE, SIGMOID
from lfmc.targets.npu.parity import SAME, Kept, operators_rung, same_outputs
from lfmc.targets.npu.qdq_pairs import paired
from lfmc.targets.npu.static_ranges import Step
from lfmc.targets.shared.parameters_file import open_parameters

# Steps that an operator may be off by: one. But TOSA's functions are tables, which have every value
# of 8 bits, and of 16 bits 513, with lines between them: 27 steps off were measured.
ALLOWED, ALLOWED_OF_LINES = 1.0, 64.0
FUNCTIONS = (SIGMOID, *PARTS_BY_TABLE)


def rungs(program: Program, folder: Path) -> tuple[Rung, Rung]:
    """Every operator of the artifact in a folder, in graphs that give what it keeps, too; and that
    these graphs compute what the artifact's own do, which show nothing of what is inside."""
    held = open_parameters(folder, HOST_FILE)
    steps, style, constants = steps_of(held), style_of(held), open_parameters(folder)
    accelerator = ACCELERATORS[held.facts["accelerator"]]
    same: list[CaseResult] = []

    def probe(interface: Interface, inputs: Mapping[str, Tensor]) -> Kept:
        pairs = paired(program, interface, steps, constants, CODING, style, probed=True, coded=True)
        tosa, places = tosa_of(pairs, accelerator)
        given = [CODING.codes(inputs[name], steps[name]) for name in interface.inputs]
        outputs = len(interface.outputs)
        known = [
            (name, place)
            for name, place in zip(pairs.kept, places[outputs:], strict=True)
            if place >= 0
        ]
        made = run_tosa(tosa, [*places[:outputs], *(place for _, place in known)])(given)
        shipped, name = shipped_graph(folder, interface.tokens), graph_name(interface.tokens)
        same.append(same_outputs(name, shipped(given), made[:outputs]))
        return [
            (name, CODING.values(own, steps[name]))
            for (name, _), own in zip(known, made[outputs:], strict=True)
        ]

    def allowed(name: str, step: Step) -> float:
        lines = step.bits == 16 and name.endswith(FUNCTIONS)
        return ALLOWED_OF_LINES if lines else ALLOWED

    operators = operators_rung(program, folder, probe, allowed)
    return Rung(3, SAME, 0.0, tuple(same)), operators
