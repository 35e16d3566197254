"""What lowering for an accelerator begins with: steps of values, and files of constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from lfmc.calib_free.auto.sampled_text import write_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.grid.formats import Format
from lfmc.errors import UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.targets.base import StoredTensor
from lfmc.targets.npu.bound_constants import Bound
from lfmc.targets.npu.bundle import HOST_FILE, TABLE_FILE
from lfmc.targets.npu.constants import NpuConstants
from lfmc.targets.npu.forms import Style
from lfmc.targets.npu.graph import Sources
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.static_ranges import Step, observe
from lfmc.targets.shared.parameters_file import PARAMETERS, Parameter, write

# Texts that the model writes, on which ranges of values are seen, and their tokens. With 16 bits
# there is room for what no text would hold, too: as many of tokens at random.
TEXTS, LENGTH, SEED = 24, 96, 0
ROOM = 16


@dataclass(frozen=True)
class Made:
    """Names of files, what is stored in the first of them, and facts for the manifest."""

    sources: tuple[str, ...]
    compiled: tuple[str, ...]
    stored: tuple[StoredTensor, ...]
    facts: dict[str, Any]


class NpuLowering:
    """Of a bound program, for values of `bits` (0 for floats). `steps` are of every value, by name;
    `balanced` tells which of them have signed codes."""

    def __init__(
        self,
        program: Program,
        weights: PlannedWeights,
        context: int,
        chunk: int,
        bits: int,
        style: Style,
        balanced: Callable[[str], bool],
    ) -> None:
        self.program, self.weights, self.bits, self.style = program, weights, bits, style
        self.constants = NpuConstants(weights)
        self.interface = Interface.of(program.config, context, chunk)
        self.lengths = sorted({1, chunk})
        self.embedding = _embedding(program)
        self.steps: dict[str, Step] = self._observed(balanced) if bits else {}
        self._table: list[Parameter] = []

    def write_constants(
        self, folder: Path, sources: tuple[Sources, ...], *, alone: bool
    ) -> list[str]:
        """Write the constants of graphs, and the embedding where a host has compiled graphs `alone`
        and these hold it; names of files that no budget counts."""
        constants, tied = self.constants, (self.embedding,) in sources
        for own in sources:
            constants.constant(own)
        write(folder / PARAMETERS, list(constants.parameters.values()), {})
        if not tied:
            self._table = constants.keep_table(self.embedding)
        if not (tied and alone):
            return []
        write(folder / TABLE_FILE, constants.table(self.embedding), {})
        return [TABLE_FILE]

    def write_host(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write what a host needs besides: facts, and the embedding where no graph holds it."""
        steps = {name: astuple(own) for name, own in self.steps.items()}
        held = {**self.facts(), **facts, "steps": steps, "style": asdict(self.style)}
        write(folder / HOST_FILE, self._table, held)

    def facts(self) -> dict[str, Any]:
        """What both a host and a manifest are told."""
        format = self.weights.format(self.embedding)
        return {
            "lengths": self.lengths,
            "interface": asdict(self.interface),
            "embedding": self.embedding,
            "embedding_bits": format.bits if isinstance(format, Format) else 0,
        }

    def _observed(self, balanced: Callable[[str], bool]) -> dict[str, Step]:
        """Steps that hold what text of the model's own makes of the planned weights."""
        length = min(LENGTH, self.interface.context)
        decoder = StreamedDecoder(self.weights.checkpoint)
        texts = write_texts(decoder, TEXTS, length, SEED, lambda part: None)
        if self.bits >= ROOM:
            generator = torch.Generator().manual_seed(SEED)
            vocab_size = self.program.config.vocab_size
            texts = torch.cat([texts, torch.randint(vocab_size, texts.shape, generator=generator)])
        texts %= self.program.config.vocab_size  # one that is cut for a trace takes fewer
        bound, seen = Bound(self.program), self.interface.of_tokens(length)
        embed = bound.embed(self.embedding)
        ranges = observe(self.program, seen, bound, embed, texts, self.style)
        return ranges.steps(self.bits, balanced)


def _embedding(program: Program) -> str:
    """The table that tokens are looked up in."""
    for name in ("lfm.embedding_nbits", "aten.embedding"):
        for node in program.nodes(name):
            place = 1 if name.startswith("lfm") else 0
            held: Any = node.args[place]
            return program.tensor_behind(held)
    raise UnsupportedError("the model looks up no embedding")
