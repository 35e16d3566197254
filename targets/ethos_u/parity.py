"""Values that an artifact's graphs keep, by TOSA's reference model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lfmc.parity import Rung
from lfmc.program import Program
from lfmc.targets.ethos_u.accelerators import ACCELERATORS
from lfmc.targets.ethos_u.compile import CODING, tosa_of
from lfmc.targets.ethos_u.runtime import run_tosa
from lfmc.targets.npu.bundle import HOST_FILE, steps_of, style_of
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.names import PARTS_BY_TABLE, SIGMOID
from lfmc.targets.npu.pairs import paired
from lfmc.targets.npu.parity import Kept, operators_rung
from lfmc.targets.npu.steps import Step
from lfmc.targets.parameters import open_parameters

# Steps that an operator may be off by: one. But TOSA's functions are tables, which have every value
# of 8 bits, and of 16 bits 513, with lines between them: 27 steps off were measured.
ALLOWED, ALLOWED_OF_LINES = 1.0, 64.0
FUNCTIONS = (SIGMOID, *PARTS_BY_TABLE)


def rung(program: Program, folder: Path) -> Rung:
    """Every operator of the artifact in a folder."""
    held = open_parameters(folder, HOST_FILE)
    steps, style, constants = steps_of(held), style_of(held), open_parameters(folder)
    accelerator = ACCELERATORS[held.facts["accelerator"]]

    def probe(interface: Interface, inputs: Mapping[str, Tensor]) -> Kept:
        pairs = paired(program, interface, steps, constants, CODING, style, probed=True, coded=True)
        tosa, places = tosa_of(pairs, accelerator)
        given = [CODING.codes(inputs[name], steps[name]) for name in interface.inputs]
        skipped = len(interface.outputs)
        known = [
            (name, place)
            for name, place in zip(pairs.kept, places[skipped:], strict=True)
            if place >= 0
        ]
        made = run_tosa(tosa, [place for _, place in known])(given)
        return [
            (name, CODING.values(own, steps[name]))
            for (name, _), own in zip(known, made, strict=True)
        ]

    def allowed(name: str, step: Step) -> float:
        lines = step.bits == 16 and name.endswith(FUNCTIONS)
        return ALLOWED_OF_LINES if lines else ALLOWED

    return operators_rung(program, folder, probe, allowed)
