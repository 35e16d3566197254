"""Running a bundle the way an app does: ONNX Runtime for the graphs, the host for all else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lfmc.errors import InputError
from lfmc.targets.npu.constants import embed
from lfmc.targets.npu.host import Embed, HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.steps import Step
from lfmc.targets.parameters import PARAMETERS, Parameters, open_parameters
from lfmc.targets.qualcomm.session import open_session, run
from lfmc.targets.qualcomm.socs import SOCS

HOST_FILE = "host.safetensors"  # what the host needs besides the graphs
TABLE_FILE = "embedding.safetensors"  # the table, for a host of compiled graphs
SOURCE = "{}.qdq.onnx"  # what a graph is compiled from
COMPILED = "{}.onnx"
DECODE, PREFILL = "decode", "prefill"


def graph_name(tokens: int) -> str:
    return DECODE if tokens == 1 else PREFILL


def stepper(folder: Path) -> HostStepper:
    """One conversation with the bundle in a folder."""
    held = open_parameters(folder, HOST_FILE)
    facts = held.facts
    compiled = facts["stage"] == "context"
    soc = SOCS[facts["soc"]] if compiled else None
    sessions = {}
    for count in facts["lengths"]:
        path = folder / (COMPILED if compiled else SOURCE).format(graph_name(count))
        if not path.is_file():
            raise InputError("there is no model", where=path)
        halves = facts["activations"] == "float16"
        sessions[count] = open_session(path, soc, halves=halves)

    def execute(count: int, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return run(sessions[count], inputs)

    interface = Interface.from_dict(facts["interface"])
    return HostStepper(interface, facts["lengths"], execute, embedding(folder))


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
