"""Files of a bundle beside its graphs: constants, the facts for a host, and the embedding."""

from __future__ import annotations

from pathlib import Path

from lfmc.targets.npu.constants import look_up
from lfmc.targets.npu.forms import Style
from lfmc.targets.npu.host import Embed
from lfmc.targets.npu.static_ranges import Step
from lfmc.targets.shared.parameters_file import PARAMETERS, Parameters, open_parameters

HOST_FILE = "host.safetensors"  # facts and constants for the host
TABLE_FILE = "embedding.safetensors"  # the embedding table, for a host with compiled graphs
DECODE, PREFILL = "decode", "prefill"


def graph_name(tokens: int) -> str:
    return DECODE if tokens == 1 else PREFILL


def open_embedding(folder: Path) -> Embed:
    """Return a function that looks up float32 embeddings `[T, H]` of tokens.

    The table is in the host file, in its own file, or in the head's matrix.
    """
    host_file = open_parameters(folder, HOST_FILE)
    facts, table = host_file.facts, host_file
    if not host_file.names:
        has_table_file = (folder / TABLE_FILE).is_file()
        table = open_parameters(folder, TABLE_FILE if has_table_file else PARAMETERS)
    return lambda ids: look_up(table, facts["embedding"], facts["embedding_bits"], ids)


def read_steps(host_file: Parameters) -> dict[str, Step]:
    """Return the quantization step of each value, by name."""
    return {name: Step(*fields) for name, fields in host_file.facts["steps"].items()}


def read_style(host_file: Parameters) -> Style:
    return Style(**host_file.facts["style"])
