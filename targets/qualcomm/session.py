"""ONNX Runtime sessions on a CPU, or on QNN's HTP backend, which is emulated off a device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.errors import InputError, UnsupportedError, first_line
from lfmc.machine.quiet import silence_stdout
from lfmc.targets.base import require
from lfmc.targets.qualcomm.socs import Soc

PROVIDER, PACKAGE, EXTRA = "QNNExecutionProvider", "onnxruntime_qnn", "qualcomm"


def has_qnn() -> bool:
    return find_spec(PACKAGE) is not None


@cache
def _devices() -> list[Any]:
    """Register QNN's library and return its devices."""
    runtime, qnn = require("onnxruntime", EXTRA), require(PACKAGE, EXTRA)
    runtime.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    return [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER]


def open_session(
    path: Path, soc: Soc | None, *, float16: bool = False, context: Path | None = None
) -> Any:
    """Open a model: for a chip entirely in QNN, else on the CPU without fusion.

    `float16` computes in float16. The compiled model is written to `context`.
    """
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
    provider_options = {
        "backend_path": qnn.get_qnn_htp_path(),
        "soc_model": str(soc.model),
        "htp_arch": str(soc.arch),
        "enable_htp_fp16_precision": str(int(float16)),
    }
    options.add_provider_for_devices(_devices()[:1], provider_options)
    try:
        with silence_stdout():
            return runtime.InferenceSession(path, options)
    except Exception as error:  # ONNX Runtime's exceptions share no other base class
        raise UnsupportedError(
            f"QNN can't compile the model for {soc.name}", where=path, got=first_line(error)
        ) from error


def run(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a session and return its outputs by name."""
    output_names = [output.name for output in session.get_outputs()]
    input_names = [session_input.name for session_input in session.get_inputs()]
    missing = set(input_names) - set(inputs)
    if missing:
        raise InputError("inputs of the model are missing", got=", ".join(sorted(missing)))
    arrays = {name: inputs[name].contiguous().numpy() for name in input_names}
    return {
        name: torch.from_numpy(value)
        for name, value in zip(output_names, session.run(output_names, arrays), strict=True)
    }
