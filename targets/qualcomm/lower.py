"""Lower a program to models for QNN: graphs of two lengths with one file of constants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.npu.bundle import HOST_FILE, graph_name
from lfmc.targets.npu.forms import BY_TAPS, DEFAULT_STYLE
from lfmc.targets.npu.graph import Graph, trace_graph
from lfmc.targets.npu.lowering import WIDE_BITS, LoweredFiles, NpuLowering
from lfmc.targets.npu.names import is_second_operand
from lfmc.targets.npu.qdq_pairs import build_qdq_graph
from lfmc.targets.npu.rounding_operator import insert_rounding
from lfmc.targets.npu.static_ranges import no_values
from lfmc.targets.qualcomm.delegate import CODING, compile_graph
from lfmc.targets.qualcomm.qdq import SUPPORTED, build_model, count_operators, save
from lfmc.targets.qualcomm.runtime import COMPILED, SOURCE
from lfmc.targets.qualcomm.session import open_session
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters


def leave_unrounded(value: Tensor, name: str) -> Tensor:
    return value


class Lowering(NpuLowering):
    """Lowering of a bound program."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, chunk: int, bits: int
    ) -> None:
        # QNN's convolutions support no 16-bit filters. In a product of two 16-bit values, QNN uses
        # all bits of the second operand only if its codes are signed, else 8 bits.
        style = BY_TAPS if bits else DEFAULT_STYLE
        is_symmetric = is_second_operand if bits == WIDE_BITS else no_values
        super().__init__(program, weights, context, chunk, bits, style, is_symmetric)

    def graph(self, tokens: int) -> Graph:
        """Return the graph for calls of `tokens` tokens."""
        round_value = insert_rounding(self.steps) if self.bits else leave_unrounded
        interface = self.interface.with_tokens(tokens)
        return trace_graph(
            self.program, interface, self.constants.shape_of, round_value, self.style
        )

    def write(self, folder: Path, options: Mapping[str, str]) -> LoweredFiles:
        """Write constants and models, and with `stage=context` models compiled for a chip."""
        constants, names = self.constants, list(self.interface.outputs)
        graphs = {count: self.graph(count) for count in self.lengths}
        rounded, context = bool(self.bits), options["stage"] == "context"
        models = {
            count: build_model(graph, constants, names, rounded=rounded)
            for count, graph in graphs.items()
        }
        settings = {name: options[name] for name in ("soc", "runtime", "stage", "activations")}
        compiled = self.write_constants(folder, graphs[1].constants, compiled_only=context)
        self.write_host(folder, {**settings, "kept": list(graphs[1].value_names)})
        sources = [PARAMETERS, HOST_FILE]
        for count, model in models.items():
            source = folder / SOURCE.format(graph_name(count))
            save(model, open_parameters(folder), source)
            sources.append(source.name)
            if context:
                compiled.append(self._compile(source, count, options).name)
        operators = count_operators(models.values())
        facts = {
            **settings,
            **self.facts(),
            "operators": operators,
            "not_known_to_qnn": sorted(set(operators) - SUPPORTED),
            "compiled_nbytes": {name: (folder / name).stat().st_size for name in compiled},
        }
        return LoweredFiles(tuple(sources), tuple(compiled), tuple(constants.stored), facts)

    def _compile(self, source: Path, tokens: int, options: Mapping[str, str]) -> Path:
        """Compile the graph for calls of `tokens` tokens; its constants are beside `source`."""
        soc, runtime = SOCS[options["soc"]], options["runtime"]
        path = source.with_name(COMPILED[runtime].format(graph_name(tokens)))
        if runtime == "onnxruntime":
            open_session(source, soc, float16=not self.bits, context=path)
        else:
            file, interface = open_parameters(source.parent), self.interface.with_tokens(tokens)
            graph = build_qdq_graph(self.program, interface, self.steps, file, CODING, self.style)
            compile_graph(graph, soc, path, float16=not self.bits)
        return path
