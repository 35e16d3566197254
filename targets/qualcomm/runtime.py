"""Run a bundle as an app does: a runtime executes the graphs, and the host does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from lfmc.errors import InputError
from lfmc.targets.npu.bundle import HOST_FILE, graph_name, open_embedding
from lfmc.targets.npu.host import HostStepper
from lfmc.targets.npu.interface import Interface
from lfmc.targets.qualcomm.delegate import open_pte
from lfmc.targets.qualcomm.session import open_session, run
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.targets.shared.parameters_file import open_parameters

SOURCE = "{}.qdq.onnx"  # a graph before compilation
COMPILED = {"onnxruntime": "{}.onnx", "executorch": "{}.pte"}  # by runtime
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def stepper(folder: Path) -> HostStepper:
    """Return a stepper for one conversation with the bundle in a folder."""
    facts = open_parameters(folder, HOST_FILE).facts
    interface = Interface.from_dict(facts["interface"])
    graphs = {
        count: shipped_graph(folder, interface.with_tokens(count)) for count in facts["lengths"]
    }

    def execute(count: int, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return graphs[count](inputs)

    return HostStepper(interface, facts["lengths"], execute, open_embedding(folder))


def shipped_graph(folder: Path, interface: Interface) -> Run:
    """Return a function that runs the artifact's graph for calls of `interface`."""
    facts = open_parameters(folder, HOST_FILE).facts
    compiled, runtime = facts["stage"] == "context", facts["runtime"]
    name = COMPILED[runtime] if compiled else SOURCE
    path = folder / name.format(graph_name(interface.tokens))
    if not path.is_file():
        raise InputError("there is no model", where=path)
    if compiled and runtime == "executorch":
        return open_pte(path, list(interface.inputs), list(interface.outputs))
    soc, float16 = SOCS[facts["soc"]] if compiled else None, facts["activations"] == "float16"
    return partial(run, open_session(path, soc, float16=float16))
