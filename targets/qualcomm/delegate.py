"""Compile a graph into a `.pte` with ExecuTorch and the QNN SDK at QNN_SDK_ROOT."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lfmc.errors import UnsupportedError, first_line
from lfmc.machine.quiet import quiet, silence_stdout
from lfmc.targets.npu.qdq_pairs import Coding, QdqGraph
from lfmc.targets.qualcomm.socs import Soc

SDK_ROOT = "QNN_SDK_ROOT"
LIBRARY_FOLDER = "lib/x86_64-linux-clang"
LIBRARIES = ("libQnnSystem.so", "libQnnHtp.so")
# Versions of QNN that were tested with ExecuTorch 1.5.1: tests/benchmarks/qnn_sdk.py, ten rounds.
WORKING_VERSIONS, FAILING_VERSIONS = ("2.49",), ("2.47", "2.48", "2.50", "2.51")
# ExecuTorch's QNN backend takes 16-bit codes as int32. The zero point marks codes as signed.
CODING = Coding({8: torch.uint8, 16: torch.int32}, signed=False)


def sdk_root() -> Path | None:
    """Return the SDK at QNN_SDK_ROOT, or None if its libraries are missing."""
    root = os.environ.get(SDK_ROOT)
    path = Path(root) if root else None
    return path if path and (path / LIBRARY_FOLDER / LIBRARIES[-1]).is_file() else None


def version_advice() -> str:
    """Return the SDK's version, and which versions passed and failed the tests."""
    working, failing = ", ".join(WORKING_VERSIONS), ", ".join(FAILING_VERSIONS)
    return f"this is QNN {sdk_version()}; in tests, QNN {working} worked, and {failing} failed"


def sdk_version() -> str:
    """Return the version that the SDK at QNN_SDK_ROOT reports, such as `2.49.0`."""
    root = _require_sdk()
    with quiet(), silence_stdout():
        from executorch.backends.qualcomm.python import PyQnnManagerAdaptor

        library = root / LIBRARY_FOLDER / LIBRARIES[-1]
        build_id: str = PyQnnManagerAdaptor.GetQnnSdkBuildId(str(library))
    return ".".join(build_id.removeprefix("v").split(".")[:3])


@cache
def _load_sdk(root: Path) -> None:
    """Load QNN's libraries, because ExecuTorch opens them by name without a path."""
    for name in LIBRARIES:
        path = root / LIBRARY_FOLDER / name
        if path.is_file():
            with silence_stdout():
                ctypes.CDLL(str(path))


def _require_sdk() -> Path:
    root = sdk_root()
    if root is None:
        raise UnsupportedError(
            f"ExecuTorch's QNN backend needs Qualcomm's SDK at {SDK_ROOT}",
            expected=f"a folder with {LIBRARY_FOLDER}/{LIBRARIES[-1]}",
            got=os.environ.get(SDK_ROOT) or "nothing",
        )
    _load_sdk(root)
    return root


def compile_graph(graph: QdqGraph, soc: Soc, path: Path, *, float16: bool) -> None:
    """Compile a graph for a chip, as one delegate. `float16` computes in float16.

    Raises `UnsupportedError` if QNN does not support every operator.
    """
    _require_sdk()
    with quiet("executorch", "executorch.backends.qualcomm"), silence_stdout():
        from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
        from executorch.backends.qualcomm.utils import utils

        backend = utils.generate_htp_compiler_spec(use_fp16=float16)
        specs = utils.generate_qnn_executorch_compiler_spec(
            soc_model=QcomChipset(soc.model), backend_options=backend
        )
        try:
            with torch.no_grad():
                edge = utils.to_edge_transform_and_lower_to_qnn(graph.module, graph.example, specs)
            calls = [n for n in edge.exported_program().graph.nodes if n.op == "call_function"]
            buffer = edge.to_executorch().buffer
        except (RuntimeError, AssertionError) as error:
            raise UnsupportedError(
                f"ExecuTorch can't compile the graph for {soc.name}",
                where=path,
                got=first_line(error),
                todo=version_advice(),
            ) from error
    operators = sorted({str(n.target) for n in calls if "getitem" not in str(n.target)})
    if operators != ["executorch_call_delegate"]:
        raise UnsupportedError(
            "QNN does not support every operator", where=path, got=", ".join(operators)
        )
    path.write_bytes(buffer)


def open_pte(
    path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return a function that runs a compiled graph; inputs and outputs are by name."""
    _require_sdk()
    with quiet(), silence_stdout():
        from executorch.extension.pybindings import portable_lib

        module = portable_lib._load_for_executorch(str(path))

    def run(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with silence_stdout():
            results = module.forward([values[name].contiguous() for name in inputs])
        return dict(zip(outputs, (result.clone() for result in results), strict=True))

    return run
