"""Running a bundle the way an app does: a runtime for the graphs, the host for all else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lfmc.errors import InputError
from lfmc.targets.npu.constants import embed
from lfmc.targets.npu.host import Embed, HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.steps import Step
from lfmc.targets.parameters import PARAMETERS, Parameters, open_parameters
from lfmc.targets.qualcomm.delegate import open_pte
from lfmc.targets.qualcomm.session import open_session, run
from lfmc.targets.qualcomm.socs import SOCS

HOST_FILE = "host.safetensors"  # what the host needs besides the graphs
TABLE_FILE = "embedding.safetensors"  # the table, for a host of compiled graphs
SOURCE = "{}.qdq.onnx"  # what a graph is compiled from
COMPILED = {"onnxruntime": "{}.onnx", "executorch": "{}.pte"}  # by runtime
DECODE, PREFILL = "decode", "prefill"

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def graph_name(tokens: int) -> str:
    return DECODE if tokens == 1 else PREFILL


def stepper(folder: Path) -> HostStepper:
    """One conversation with the bundle in a folder."""
    facts = open_parameters(folder, HOST_FILE).facts
    interface = Interface.from_dict(facts["interface"])
    graphs = {count: _open(folder, facts, interface.of_tokens(count)) for count in facts["lengths"]}

    def execute(count: int, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return graphs[count](inputs)

    return HostStepper(interface, facts["lengths"], execute, embedding(folder))


def _open(folder: Path, facts: Mapping[str, Any], interface: Interface) -> Run:
    """The graph for calls of `interface`."""
    compiled, runtime = facts["stage"] == "context", facts["runtime"]
    name = COMPILED[runtime] if compiled else SOURCE
    path = folder / name.format(graph_name(interface.tokens))
    if not path.is_file():
        raise InputError("there is no model", where=path)
    if compiled and runtime == "executorch":
        return open_pte(path, list(interface.inputs), list(interface.outputs))
    soc, halves = SOCS[facts["soc"]] if compiled else None, facts["activations"] == "float16"
    return partial(run, open_session(path, soc, halves=halves))


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
