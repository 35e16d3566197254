"""quantize-embedding, without a head and with a tied head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.graph.program import Program
from lfmc.passes.base import apply
from lfmc.passes.quantize_embedding import QuantizeEmbedding
from lfmc.passes.quantize_linears import QuantizeLinears
from lfmc.passes.remove_dead_code import RemoveDeadCode
from tests.passes.graphs import QuantizedWeights, program_of, random

FORMATS = {"table.weight": Format(8, 32, False, "float16")}
IDS = torch.tensor([[0, 6, 6]])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 40)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (F.linear(self.table(ids), self.table.weight),)


class Untied(Tied):
    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (self.table(ids),)


class Computed(Tied):
    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (F.embedding(ids, self.table.weight * 2),)


def quantized(module: nn.Module, formats: dict[str, Format | Floats]) -> tuple[Program, list[int]]:
    program = program_of(module, IDS, clean=True)
    weights = QuantizedWeights({"table.weight": random(7, 40)}, formats)
    steps = [QuantizeEmbedding(formats), QuantizeLinears(formats), RemoveDeadCode()]
    record = apply(steps, program)
    result = program.bind(weights.value)(IDS)[0]
    module.load_state_dict({"table.weight": weights.dequantized("table.weight")})
    assert torch.equal(result, module(IDS)[0])
    return program, [entry.changed for entry in record[:2]]


def test_fires(golden: Callable[[str, str], None]) -> None:
    program, fired = quantized(Untied(), FORMATS)
    assert fired == [1, 0]
    golden("quantize_embedding", program.text())


def test_a_tied_head_reads_the_same_codes() -> None:
    program, fired = quantized(Tied(), FORMATS)
    assert fired == [1, 1]
    (lookup,) = program.nodes("lfm.embedding_nbits")
    (head,) = program.nodes("lfm.linear_nbits")
    assert lookup.args[1:4] == head.args[1:4]
    assert sorted(program.weights) == ["table.codes", "table.scales", "table.zeros"]


def test_must_not_fire_on_a_table_that_stays_float() -> None:
    program, fired = quantized(Tied(), {"table.weight": Floats("float32")})
    assert fired == [0, 0]
    assert program.count("aten.embedding") == 1


def test_must_not_fire_on_a_table_that_is_computed() -> None:
    program = program_of(Computed(), IDS, clean=True)
    text = program.text()
    (record,) = apply([QuantizeEmbedding(FORMATS)], program)
    assert (record.changed, program.text()) == (0, text)
