"""Sessions of ONNX Runtime: on a CPU, or on QNN's HTP backend, which off a device is emulated."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.errors import InputError, UnsupportedError, first_line
from lfmc.machine.quiet import no_output
from lfmc.targets.base import require
from lfmc.targets.qualcomm.socs import Soc

PROVIDER, PACKAGE, EXTRA = "QNNExecutionProvider", "onnxruntime_qnn", "qualcomm"


def has_qnn() -> bool:
    return find_spec(PACKAGE) is not None


@cache
def _devices() -> list[Any]:
    """QNN's devices, once its library is registered."""
    runtime, qnn = require("onnxruntime", EXTRA), require(PACKAGE, EXTRA)
    runtime.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    return [own for own in runtime.get_ep_devices() if own.ep_name == PROVIDER]


def open_session(
    path: Path, soc: Soc | None, *, halves: bool = False, context: Path | None = None
) -> Any:
    """A session of a model: for a chip by QNN and nothing else, else on the CPU operator by
    operator. `halves` computes in float16; `context` is where the compiled model is written."""
    runtime = require("onnxruntime", EXTRA)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if soc is None:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    qnn = require(PACKAGE, EXTRA)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if context is not None:
        entries = {"enable": "1", "embed_mode": "1", "file_path": str(context)}
        for name, value in entries.items():
            options.add_session_config_entry(f"ep.context_{name}", value)
    asked = {
        "backend_path": qnn.get_qnn_htp_path(),
        "soc_model": str(soc.model),
        "htp_arch": str(soc.arch),
        "enable_htp_fp16_precision": str(int(halves)),
    }
    options.add_provider_for_devices(_devices()[:1], asked)
    try:
        with no_output():
            return runtime.InferenceSession(path, options)
    except Exception as error:  # of ONNX Runtime's own kinds, which share no other base
        raise UnsupportedError(
            f"QNN can't compile the model for {soc.name}", where=path, got=first_line(error)
        ) from error


def run(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name."""
    names = [own.name for own in session.get_outputs()]
    wanted = [own.name for own in session.get_inputs()]
    missing = set(wanted) - set(inputs)
    if missing:
        raise InputError("the model wants other inputs", got=", ".join(sorted(missing)))
    given = {name: inputs[name].contiguous().numpy() for name in wanted}
    return {
        name: torch.from_numpy(value)
        for name, value in zip(names, session.run(names, given), strict=True)
    }
