"""From a program to models for QNN: graphs of two lengths over one file of constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.calib_free.formats import Format
from lfmc.calib_free.streamed import StreamedDecoder
from lfmc.calib_free.texts import write_texts
from lfmc.errors import UnsupportedError
from lfmc.program import Program
from lfmc.targets.base import StoredTensor
from lfmc.targets.npu.bound import Bound
from lfmc.targets.npu.constants import NpuConstants
from lfmc.targets.npu.graph import Graph, traced
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.operator import marked
from lfmc.targets.npu.pairs import paired
from lfmc.targets.npu.steps import Step, observe
from lfmc.targets.parameters import PARAMETERS, open_parameters, write
from lfmc.targets.qualcomm.delegate import CODING, compile_graph
from lfmc.targets.qualcomm.qdq import TAKEN, model_of, operators, save
from lfmc.targets.qualcomm.runtime import COMPILED, HOST_FILE, SOURCE, TABLE_FILE, graph_name
from lfmc.targets.qualcomm.session import open_session
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.weights import PlannedWeights

# Texts that the model writes, on which ranges of values are seen, and their tokens. With 16 bits
# there is room for what no text would hold, too: as many of tokens at random.
TEXTS, LENGTH, SEED = 24, 96, 0
ROOM = 16


def keep_floats(value: Tensor, name: str) -> Tensor:
    return value


@dataclass(frozen=True)
class Made:
    """Names of files, what is stored in the first of them, and what a host has to know."""

    sources: tuple[str, ...]
    compiled: tuple[str, ...]
    stored: tuple[StoredTensor, ...]
    facts: dict[str, Any]


class Lowering:
    """Of a bound program. `steps` are of every value, by name; none where values stay floats."""

    def __init__(
        self, program: Program, weights: PlannedWeights, context: int, chunk: int, bits: int
    ) -> None:
        self.program, self.weights, self.bits = program, weights, bits
        self.constants = NpuConstants(weights)
        self.interface = Interface.of(program.config, context, chunk)
        self.lengths = sorted({1, chunk})
        self.embedding = _embedding(program)
        self.steps: dict[str, Step] = self._observed() if bits else {}

    @property
    def by_taps(self) -> bool:
        """QNN's convolutions have no 16-bit filters."""
        return bool(self.bits)

    def graph(self, tokens: int) -> Graph:
        """The graph for calls of so many tokens."""
        return traced(
            self.program,
            self.interface.of_tokens(tokens),
            self.constants.shape_of,
            marked(self.steps) if self.bits else keep_floats,
            by_taps=self.by_taps,
        )

    def write(self, folder: Path, options: Mapping[str, str]) -> Made:
        """Constants, models, and, where that is asked for, models compiled for a chip."""
        constants, names = self.constants, list(self.interface.outputs)
        graphs = {count: self.graph(count) for count in self.lengths}
        rounded = bool(self.bits)
        models = {
            count: model_of(graph, constants, names, rounded=rounded)
            for count, graph in graphs.items()
        }
        tied = any(self.embedding in sources for sources in graphs[1].constants)
        table = constants.table(self.embedding) if tied else constants.keep_table(self.embedding)
        facts = self._facts(options)
        steps = {name: astuple(own) for name, own in self.steps.items()}
        held = {**facts, "steps": steps, "kept": list(graphs[1].kept)}
        write(folder / HOST_FILE, [] if tied else table, held)
        write(folder / PARAMETERS, list(constants.parameters.values()), {})
        sources, compiled = [PARAMETERS, HOST_FILE], []
        if options["stage"] == "context" and tied:
            write(folder / TABLE_FILE, table, {})
            compiled.append(TABLE_FILE)
        for count, model in models.items():
            source = folder / SOURCE.format(graph_name(count))
            save(model, open_parameters(folder), source)
            sources.append(source.name)
            if options["stage"] == "context":
                compiled.append(self._compile(source, count, options).name)
        found = operators(models.values())
        facts["operators"] = found
        facts["not_known_to_qnn"] = sorted(set(found) - TAKEN)
        facts["compiled_nbytes"] = {name: (folder / name).stat().st_size for name in compiled}
        return Made(tuple(sources), tuple(compiled), tuple(constants.stored), facts)

    def _compile(self, source: Path, tokens: int, options: Mapping[str, str]) -> Path:
        """Compile the graph for calls of so many tokens; its constants lie beside `source`."""
        soc, runtime = SOCS[options["soc"]], options["runtime"]
        made = source.with_name(COMPILED[runtime].format(graph_name(tokens)))
        if runtime == "onnxruntime":
            open_session(source, soc, halves=not self.bits, context=made)
        else:
            held, interface = open_parameters(source.parent), self.interface.of_tokens(tokens)
            pairs = paired(self.program, interface, self.steps, held, CODING)
            compile_graph(pairs, soc, made, halves=not self.bits)
        return made

    def _facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        format = self.weights.format(self.embedding)
        return {
            **{name: options[name] for name in ("soc", "runtime", "stage", "activations")},
            "lengths": self.lengths,
            "interface": asdict(self.interface),
            "embedding": self.embedding,
            "embedding_bits": format.bits if isinstance(format, Format) else 0,
        }

    def _observed(self) -> dict[str, Step]:
        """Steps that hold what text of the model's own makes of the planned weights."""
        length = min(LENGTH, self.interface.context)
        decoder = StreamedDecoder(self.weights.checkpoint)
        texts = write_texts(decoder, TEXTS, length, SEED, lambda part: None)
        if self.bits >= ROOM:
            generator = torch.Generator().manual_seed(SEED)
            vocab_size = self.program.config.vocab_size
            texts = torch.cat([texts, torch.randint(vocab_size, texts.shape, generator=generator)])
        bound, seen = Bound(self.program), self.interface.of_tokens(length)
        ranges = observe(self.program, seen, bound, bound.embed(self.embedding), texts)
        # QNN multiplies 16-bit values by signed ones as they are, by others in 8 bits.
        return ranges.steps(self.bits, balanced=self.bits == 16)


def _embedding(program: Program) -> str:
    """The table that tokens are looked up in."""
    for name in ("lfm.embedding_nbits", "aten.embedding"):
        for node in program.nodes(name):
            place = 1 if name.startswith("lfm") else 0
            held: Any = node.args[place]
            return program.tensor_behind(held)
    raise UnsupportedError("the model looks up no embedding")
