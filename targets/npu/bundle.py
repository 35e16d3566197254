"""What a bundle has beside its graphs: constants, the facts of a host, the embedding."""

from __future__ import annotations

from pathlib import Path

from lfmc.targets.npu.constants import embed
from lfmc.targets.npu.forms import Style
from lfmc.targets.npu.host import Embed
from lfmc.targets.npu.static_ranges import Step
from lfmc.targets.shared.parameters_file import PARAMETERS, Parameters, open_parameters

HOST_FILE = "host.safetensors"  # what the host needs besides the graphs
TABLE_FILE = "embedding.safetensors"  # the table, for a host of compiled graphs
DECODE, PREFILL = "decode", "prefill"


def graph_name(tokens: int) -> str:
    return DECODE if tokens == 1 else PREFILL


def embedding(folder: Path) -> Embed:
    """Float32 `[T, H]` of tokens, from the table of its own where there is one, else the head's."""
    held = open_parameters(folder, HOST_FILE)
    facts, table = held.facts, held
    if not held.names:
        alone = (folder / TABLE_FILE).is_file()
        table = open_parameters(folder, TABLE_FILE if alone else PARAMETERS)
    return lambda ids: embed(table, facts["embedding"], facts["embedding_bits"], ids)


def steps_of(held: Parameters) -> dict[str, Step]:
    """What values are rounded to, by name."""
    return {name: Step(*own) for name, own in held.facts["steps"].items()}


def style_of(held: Parameters) -> Style:
    return Style(**held.facts["style"])
