"""The first part of lowering for an accelerator: steps of values, and files of constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from lfmc.calib_free.auto.sampled_text import sample_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.grid.formats import Format
from lfmc.errors import UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.base import StoredTensor
from lfmc.targets.npu.bound_constants import BoundConstants
from lfmc.targets.npu.bundle import HOST_FILE, TABLE_FILE
from lfmc.targets.npu.constants import NpuConstants
from lfmc.targets.npu.forms import Style
from lfmc.targets.npu.graph import Sources
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.static_ranges import Step, observe_ranges
from lfmc.targets.shared.parameters_file import PARAMETERS, Parameter, write

# The ranges of values are observed on texts that the model writes: their count, their length in
# tokens, and their seed. 16 bits have room for values that no text produces, so as many texts of
# random tokens are added.
TEXTS, LENGTH, SEED = 24, 96, 0
WIDE_BITS = 16


@dataclass(frozen=True)
class LoweredFiles:
    """File names, the tensors stored in the first of the files, and facts for the manifest."""

    sources: tuple[str, ...]
    compiled: tuple[str, ...]
    stored: tuple[StoredTensor, ...]
    facts: dict[str, Any]


class NpuLowering:
    """Lowering of a bound program, for values of `bits` bits (0 for float values).

    `steps` maps value names to quantization steps. `is_symmetric` selects the values
    with signed codes.
    """

    def __init__(
        self,
        program: Program,
        weights: PlannedWeights,
        context: int,
        chunk: int,
        bits: int,
        style: Style,
        is_symmetric: Callable[[str], bool],
    ) -> None:
        self.program, self.weights, self.bits, self.style = program, weights, bits, style
        self.constants = NpuConstants(weights)
        self.interface = Interface.from_config(program.config, context, chunk)
        self.lengths = sorted({1, chunk})
        self.embedding = _embedding_name(program)
        self.steps: dict[str, Step] = self._observe_steps(is_symmetric) if bits else {}
        self._table: list[Parameter] = []

    def write_constants(
        self, folder: Path, sources: tuple[Sources, ...], *, compiled_only: bool
    ) -> list[str]:
        """Write the constants of the graphs; return names of files that no budget counts.

        Such a file is the embedding table. It is written if a host gets only compiled graphs, and
        these graphs contain the table.
        """
        constants, tied = self.constants, (self.embedding,) in sources
        for names in sources:
            constants.constant(names)
        write(folder / PARAMETERS, list(constants.parameters.values()), {})
        if not tied:
            self._table = constants.store_table(self.embedding)
        if not (tied and compiled_only):
            return []
        write(folder / TABLE_FILE, constants.table(self.embedding), {})
        return [TABLE_FILE]

    def write_host(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the facts for a host, and the embedding table if no graph contains it."""
        steps = {name: astuple(step) for name, step in self.steps.items()}
        host_facts = {**self.facts(), **facts, "steps": steps, "style": asdict(self.style)}
        write(folder / HOST_FILE, self._table, host_facts)

    def facts(self) -> dict[str, Any]:
        """Return the facts that are in the host file and in the manifest."""
        format = self.weights.format(self.embedding)
        return {
            "lengths": self.lengths,
            "interface": asdict(self.interface),
            "embedding": self.embedding,
            "embedding_bits": format.bits if isinstance(format, Format) else 0,
        }

    def _observe_steps(self, is_symmetric: Callable[[str], bool]) -> dict[str, Step]:
        """Return steps for the ranges that the planned weights produce on sampled text."""
        length = min(LENGTH, self.interface.context)
        decoder = StreamedDecoder(self.weights.checkpoint)
        texts = sample_texts(decoder, TEXTS, length, SEED, lambda part: None)
        if self.bits >= WIDE_BITS:
            generator = torch.Generator().manual_seed(SEED)
            vocab_size = self.program.config.vocab_size
            texts = torch.cat([texts, torch.randint(vocab_size, texts.shape, generator=generator)])
        texts %= (
            self.program.config.vocab_size
        )  # a program cut for a trace has a smaller vocabulary
        constants, interface = BoundConstants(self.program), self.interface.with_tokens(length)
        embed = constants.embedding(self.embedding)
        ranges = observe_ranges(self.program, interface, constants, embed, texts, self.style)
        return ranges.steps(self.bits, is_symmetric)


def _embedding_name(program: Program) -> str:
    """Return the name of the table that tokens are looked up in."""
    for name in ("lfm.embedding_nbits", "aten.embedding"):
        for node in program.nodes(name):
            position = 1 if name.startswith("lfm") else 0
            table: Any = node.args[position]
            return program.tensor_behind(table)
    raise UnsupportedError("the model looks up no embedding")
