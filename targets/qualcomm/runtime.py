"""Running a bundle the way an app does: a runtime for the graphs, the host for all else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from lfmc.errors import InputError
from lfmc.targets.npu.bundle import HOST_FILE, embedding, graph_name
from lfmc.targets.npu.host import HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.qualcomm.delegate import open_pte
from lfmc.targets.qualcomm.session import open_session, run
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.targets.shared.parameters_file import open_parameters

SOURCE = "{}.qdq.onnx"  # what a graph is compiled from
COMPILED = {"onnxruntime": "{}.onnx", "executorch": "{}.pte"}  # by runtime
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def stepper(folder: Path) -> HostStepper:
    """One conversation with the bundle in a folder."""
    facts = open_parameters(folder, HOST_FILE).facts
    interface = Interface.from_dict(facts["interface"])
    graphs = {
        count: shipped_graph(folder, interface.of_tokens(count)) for count in facts["lengths"]
    }

    def execute(count: int, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return graphs[count](inputs)

    return HostStepper(interface, facts["lengths"], execute, embedding(folder))


def shipped_graph(folder: Path, interface: Interface) -> Run:
    """The artifact's graph for calls of `interface`."""
    facts = open_parameters(folder, HOST_FILE).facts
    compiled, runtime = facts["stage"] == "context", facts["runtime"]
    name = COMPILED[runtime] if compiled else SOURCE
    path = folder / name.format(graph_name(interface.tokens))
    if not path.is_file():
        raise InputError("there is no model", where=path)
    if compiled and runtime == "executorch":
        return open_pte(path, list(interface.inputs), list(interface.outputs))
    soc, halves = SOCS[facts["soc"]] if compiled else None, facts["activations"] == "float16"
    return partial(run, open_session(path, soc, halves=halves))
