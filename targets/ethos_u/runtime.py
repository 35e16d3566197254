"""Running a bundle off a device: the reference model of TOSA for the graphs that Vela compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lfmc.errors import GateError, InputError
from lfmc.machine.quiet import no_output
from lfmc.targets.base import require
from lfmc.targets.ethos_u.compile import CODING
from lfmc.targets.npu.bundle import HOST_FILE, embedding, graph_name, steps_of
from lfmc.targets.npu.host import HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.static_ranges import Step
from lfmc.targets.shared.parameters_file import open_parameters

TOSA, PTE = "{}.tosa", "{}.pte"
EXTRA = "ethos-u"


def stepper(folder: Path) -> HostStepper:
    """One conversation with the bundle in a folder."""
    held = open_parameters(folder, HOST_FILE)
    facts, steps = held.facts, steps_of(held)
    interface = Interface.from_dict(facts["interface"])
    outputs = [Step(*own) for own in facts["output_steps"]]
    names = list(interface.outputs)
    graphs = {count: shipped_graph(folder, count) for count in facts["lengths"]}

    def execute(count: int, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        codes = [CODING.codes(inputs[name], steps[name]) for name in interface.inputs]
        shapes = interface.of_tokens(count).outputs
        made = zip(names, graphs[count](codes), outputs, strict=True)
        return {n: CODING.values(own, step).reshape(shapes[n]) for n, own, step in made}

    return HostStepper(interface, facts["lengths"], execute, embedding(folder))


def shipped_graph(folder: Path, tokens: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The artifact's graph for calls of so many tokens: codes of inputs to codes of outputs."""
    places = open_parameters(folder, HOST_FILE).facts["places"][str(tokens)]
    return run_tosa(_read(folder / TOSA.format(graph_name(tokens))), places)


def run_tosa(tosa: bytes, places: Sequence[int]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A graph by TOSA's reference model: codes of its inputs to codes of its outputs, which are at
    `places` of what it gives."""
    model = require("tosa_reference_model", EXTRA)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = [np.ascontiguousarray(own.numpy()) for own in inputs]
        with no_output():
            made, status = model.run(tosa, given, verbosity="NONE")
        if status != model.GraphStatus.TOSA_VALID:
            raise GateError("TOSA's reference model does not take the graph", got=str(status))
        return [torch.from_numpy(np.array(made[place])) for place in places]

    return run


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError("there is no graph", where=path)
    return path.read_bytes()
