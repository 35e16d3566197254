"""From a program to a bundle for an Ethos-U: graphs of two lengths, and the host's files."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.ethos_u.accelerators import Accelerator
from lfmc.targets.ethos_u.compile import CODING, Compiled, compile_graph
from lfmc.targets.ethos_u.runtime import PTE, TOSA
from lfmc.targets.npu.bundle import HOST_FILE, graph_name
from lfmc.targets.npu.forms import Style
from lfmc.targets.npu.graph import constants_of
from lfmc.targets.npu.lowering import Made, NpuLowering
from lfmc.targets.npu.qdq_pairs import Pairs, paired
from lfmc.targets.npu.static_ranges import every, none
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters

STYLE = Style(by_taps=True, by_parts=True)


class Lowering(NpuLowering):
    """Of a bound program."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, chunk: int, bits: int
    ) -> None:
        balanced = every if bits == 16 else none  # TOSA's 16-bit values have no zero points
        super().__init__(program, weights, context, chunk, bits, STYLE, balanced)

    def write(self, folder: Path, accelerator: Accelerator, activations: str) -> Made:
        """Constants, and graphs that are compiled of them."""
        with FakeTensorMode(), torch.no_grad():
            shape = self.constants.shape_of
            sources = tuple(constants_of(self.program, self.interface, shape, self.style))
        asked = {"accelerator": accelerator.name, "activations": activations}
        beside = self.write_constants(folder, sources, alone=True)
        compiled: dict[int, Compiled] = {}
        for count in self.lengths:
            pairs = self._pairs(folder, count)
            made = compiled[count] = compile_graph(pairs, accelerator)
            for name, data in ((TOSA, made.tosa), (PTE, made.pte)):
                path = folder / name.format(graph_name(count))
                path.write_bytes(data)
                beside.append(path.name)
        told = {
            **asked,
            "output_steps": [astuple(own) for own in pairs.steps],
            "places": {str(count): list(own.places) for count, own in compiled.items()},
        }
        self.write_host(folder, told)
        report = {graph_name(count): dict(own.report) for count, own in compiled.items()}
        facts = {
            **asked,
            **self.facts(),
            "vela": {"system": accelerator.system, "memory": accelerator.memory, **report},
            "on_cpu": [],  # nothing: a graph of which anything would is refused
            "compiled_nbytes": {name: (folder / name).stat().st_size for name in beside},
        }
        stored = tuple(self.constants.stored)
        return Made((PARAMETERS, HOST_FILE), tuple(beside), stored, facts)

    def _pairs(self, folder: Path, tokens: int) -> Pairs:
        """The graph for calls of so many tokens, of constants that are written."""
        interface, held = self.interface.of_tokens(tokens), open_parameters(folder)
        return paired(self.program, interface, self.steps, held, CODING, self.style, coded=True)
