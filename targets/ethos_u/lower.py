"""Lower a program for an Ethos-U: graphs of two lengths, and the files of the host."""

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
from lfmc.targets.npu.graph import collect_constants
from lfmc.targets.npu.lowering import LoweredFiles, NpuLowering
from lfmc.targets.npu.qdq_pairs import QdqGraph, build_qdq_graph
from lfmc.targets.npu.static_ranges import all_values, no_values
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters

STYLE = Style(by_taps=True, by_parts=True)


class Lowering(NpuLowering):
    """Lowering of a bound program."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, chunk: int, bits: int
    ) -> None:
        # TOSA's 16-bit values have no zero points.
        is_symmetric = all_values if bits == 16 else no_values
        super().__init__(program, weights, context, chunk, bits, STYLE, is_symmetric)

    def write(self, folder: Path, accelerator: Accelerator, activations: str) -> LoweredFiles:
        """Write the constants, and compile the graphs with them."""
        with FakeTensorMode(), torch.no_grad():
            shape_of = self.constants.shape_of
            sources = tuple(collect_constants(self.program, self.interface, shape_of, self.style))
        settings = {"accelerator": accelerator.name, "activations": activations}
        beside = self.write_constants(folder, sources, compiled_only=True)
        compiled: dict[int, Compiled] = {}
        for count in self.lengths:
            graph = self._qdq_graph(folder, count)
            result = compiled[count] = compile_graph(graph, accelerator)
            for name, data in ((TOSA, result.tosa), (PTE, result.pte)):
                path = folder / name.format(graph_name(count))
                path.write_bytes(data)
                beside.append(path.name)
        host_facts = {
            **settings,
            "output_steps": [astuple(step) for step in graph.steps],
            "places": {str(count): list(result.places) for count, result in compiled.items()},
        }
        self.write_host(folder, host_facts)
        report = {graph_name(count): dict(result.report) for count, result in compiled.items()}
        facts = {
            **settings,
            **self.facts(),
            "vela": {"system": accelerator.system, "memory": accelerator.memory, **report},
            "on_cpu": [],  # empty: a graph with an operator on the CPU is refused
            "compiled_nbytes": {name: (folder / name).stat().st_size for name in beside},
        }
        stored = tuple(self.constants.stored)
        return LoweredFiles((PARAMETERS, HOST_FILE), tuple(beside), stored, facts)

    def _qdq_graph(self, folder: Path, tokens: int) -> QdqGraph:
        """Return the graph for calls of `tokens` tokens, with the constants of the written file."""
        interface, file = self.interface.with_tokens(tokens), open_parameters(folder)
        return build_qdq_graph(
            self.program, interface, self.steps, file, CODING, self.style, coded=True
        )
