"""From a program to models for QNN: graphs of two lengths over one file of constants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.npu.bundle import HOST_FILE, graph_name
from lfmc.targets.npu.forms import BY_TAPS, PLAIN
from lfmc.targets.npu.graph import Graph, traced
from lfmc.targets.npu.lowering import ROOM, Made, NpuLowering
from lfmc.targets.npu.names import multiplies
from lfmc.targets.npu.qdq_pairs import paired
from lfmc.targets.npu.rounding_operator import marked
from lfmc.targets.npu.static_ranges import none
from lfmc.targets.qualcomm.delegate import CODING, compile_graph
from lfmc.targets.qualcomm.qdq import TAKEN, model_of, operators, save
from lfmc.targets.qualcomm.runtime import COMPILED, SOURCE
from lfmc.targets.qualcomm.session import open_session
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters


def keep_floats(value: Tensor, name: str) -> Tensor:
    return value


class Lowering(NpuLowering):
    """Of a bound program."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, chunk: int, bits: int
    ) -> None:
        # QNN's convolutions have no 16-bit filters; it multiplies 16-bit values by signed ones as
        # they are, by others in 8 bits.
        style = BY_TAPS if bits else PLAIN
        balanced = multiplies if bits == ROOM else none
        super().__init__(program, weights, context, chunk, bits, style, balanced)

    def graph(self, tokens: int) -> Graph:
        """The graph for calls of so many tokens."""
        keep = marked(self.steps) if self.bits else keep_floats
        shape, interface = self.constants.shape_of, self.interface.of_tokens(tokens)
        return traced(self.program, interface, shape, keep, self.style)

    def write(self, folder: Path, options: Mapping[str, str]) -> Made:
        """Constants, models, and, where that is asked for, models compiled for a chip."""
        constants, names = self.constants, list(self.interface.outputs)
        graphs = {count: self.graph(count) for count in self.lengths}
        rounded, context = bool(self.bits), options["stage"] == "context"
        models = {
            count: model_of(graph, constants, names, rounded=rounded)
            for count, graph in graphs.items()
        }
        asked = {name: options[name] for name in ("soc", "runtime", "stage", "activations")}
        compiled = self.write_constants(folder, graphs[1].constants, alone=context)
        self.write_host(folder, {**asked, "kept": list(graphs[1].kept)})
        sources = [PARAMETERS, HOST_FILE]
        for count, model in models.items():
            source = folder / SOURCE.format(graph_name(count))
            save(model, open_parameters(folder), source)
            sources.append(source.name)
            if context:
                compiled.append(self._compile(source, count, options).name)
        found = operators(models.values())
        facts = {
            **asked,
            **self.facts(),
            "operators": found,
            "not_known_to_qnn": sorted(set(found) - TAKEN),
            "compiled_nbytes": {name: (folder / name).stat().st_size for name in compiled},
        }
        return Made(tuple(sources), tuple(compiled), tuple(constants.stored), facts)

    def _compile(self, source: Path, tokens: int, options: Mapping[str, str]) -> Path:
        """Compile the graph for calls of so many tokens; its constants lie beside `source`."""
        soc, runtime = SOCS[options["soc"]], options["runtime"]
        made = source.with_name(COMPILED[runtime].format(graph_name(tokens)))
        if runtime == "onnxruntime":
            open_session(source, soc, halves=not self.bits, context=made)
        else:
            held, interface = open_parameters(source.parent), self.interface.of_tokens(tokens)
            pairs = paired(self.program, interface, self.steps, held, CODING, self.style)
            compile_graph(pairs, soc, made, halves=not self.bits)
        return made
