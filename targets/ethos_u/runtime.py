"""Run a bundle without a device: TOSA's reference model executes the graphs that Vela compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lfmc.errors import GateError, InputError
from lfmc.machine.quiet import silence_stdout
from lfmc.targets.base import require
from lfmc.targets.ethos_u.compile import CODING
from lfmc.targets.npu.bundle import HOST_FILE, graph_name, open_embedding, read_steps
from lfmc.targets.npu.host import HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.static_ranges import Step
from lfmc.targets.shared.parameters_file import open_parameters

TOSA, PTE = "{}.tosa", "{}.pte"
EXTRA = "ethos-u"


def stepper(folder: Path) -> HostStepper:
    """Return a stepper for one conversation with the bundle in a folder."""
    host_file = open_parameters(folder, HOST_FILE)
    facts, steps = host_file.facts, read_steps(host_file)
    interface = Interface.from_dict(facts["interface"])
    output_steps = [Step(*fields) for fields in facts["output_steps"]]
    names = list(interface.outputs)
    graphs = {count: shipped_graph(folder, count) for count in facts["lengths"]}

    def execute(count: int, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        input_codes = [CODING.codes(inputs[name], steps[name]) for name in interface.inputs]
        shapes = interface.with_tokens(count).outputs
        outputs = zip(names, graphs[count](input_codes), output_steps, strict=True)
        return {
            name: CODING.values(codes, step).reshape(shapes[name]) for name, codes, step in outputs
        }

    return HostStepper(interface, facts["lengths"], execute, open_embedding(folder))


def shipped_graph(folder: Path, tokens: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Return a function that runs the artifact's graph for calls of `tokens` tokens, on codes."""
    places = open_parameters(folder, HOST_FILE).facts["places"][str(tokens)]
    return run_tosa(_read(folder / TOSA.format(graph_name(tokens))), places)


def run_tosa(tosa: bytes, places: Sequence[int]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Return a function that runs a graph in TOSA's reference model, on codes.

    The function returns the results at `places`.
    """
    model = require("tosa_reference_model", EXTRA)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = [np.ascontiguousarray(codes.numpy()) for codes in inputs]
        with silence_stdout():
            results, status = model.run(tosa, arrays, verbosity="NONE")
        if status != model.GraphStatus.TOSA_VALID:
            raise GateError("TOSA's reference model rejects the graph", got=str(status))
        return [torch.from_numpy(np.array(results[place])) for place in places]

    return run


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError("there is no graph", where=path)
    return path.read_bytes()
