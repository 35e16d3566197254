"""QNN by way of ExecuTorch: a graph compiled into a `.pte` by the SDK that QNN_SDK_ROOT names."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lfmc.errors import UnsupportedError, first_line
from lfmc.machine.quiet import no_output, quiet
from lfmc.targets.npu.qdq_pairs import Coding, Pairs
from lfmc.targets.qualcomm.socs import Soc

SDK_ROOT = "QNN_SDK_ROOT"
LIBRARIES = "lib/x86_64-linux-clang"
LOADED = ("libQnnSystem.so", "libQnnHtp.so")
# Versions of QNN that ExecuTorch 1.5.1 was tried with: tests/benchmarks/qnn_sdk.py, ten rounds.
WORKS, FAILS = ("2.49",), ("2.47", "2.48", "2.50", "2.51")
# ExecuTorch's QNN takes 16-bit codes as int32, and signed ones by their zero point.
CODING = Coding({8: torch.uint8, 16: torch.int32}, signed=False)


def sdk_root() -> Path | None:
    """The user's SDK, where one is named and has what is needed."""
    root = os.environ.get(SDK_ROOT)
    found = Path(root) if root else None
    return found if found and (found / LIBRARIES / LOADED[-1]).is_file() else None


def advice() -> str:
    """What is known of the SDK's version."""
    tried = f"QNN {', '.join(WORKS)} was seen to work, {', '.join(FAILS)} were not"
    return f"this is QNN {sdk_version()}; {tried}"


def sdk_version() -> str:
    """Of the SDK that QNN_SDK_ROOT names, as it says itself: `2.49.0`, say."""
    root = _require_sdk()
    with quiet(), no_output():
        from executorch.backends.qualcomm.python import PyQnnManagerAdaptor

        told: str = PyQnnManagerAdaptor.GetQnnSdkBuildId(str(root / LIBRARIES / LOADED[-1]))
    return ".".join(told.removeprefix("v").split(".")[:3])


@cache
def _load_sdk(root: Path) -> None:
    """Load QNN's libraries, which ExecuTorch asks for by their bare names."""
    for name in LOADED:
        path = root / LIBRARIES / name
        if path.is_file():
            with no_output():
                ctypes.CDLL(str(path))


def _require_sdk() -> Path:
    root = sdk_root()
    if root is None:
        raise UnsupportedError(
            f"ExecuTorch's QNN backend needs Qualcomm's SDK: {SDK_ROOT} does not name one",
            expected=f"a folder with {LIBRARIES}/{LOADED[-1]}",
            got=os.environ.get(SDK_ROOT) or "nothing",
        )
    _load_sdk(root)
    return root


def compile_graph(pairs: Pairs, soc: Soc, path: Path, *, halves: bool) -> None:
    """Compile a graph for a chip, all of it in one delegate. `halves` computes in float16."""
    _require_sdk()
    with quiet("executorch", "executorch.backends.qualcomm"), no_output():
        from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
        from executorch.backends.qualcomm.utils import utils

        backend = utils.generate_htp_compiler_spec(use_fp16=halves)
        specs = utils.generate_qnn_executorch_compiler_spec(
            soc_model=QcomChipset(soc.model), backend_options=backend
        )
        try:
            with torch.no_grad():
                edge = utils.to_edge_transform_and_lower_to_qnn(pairs.module, pairs.example, specs)
            called = [n for n in edge.exported_program().graph.nodes if n.op == "call_function"]
            buffer = edge.to_executorch().buffer
        except (RuntimeError, AssertionError) as error:
            raise UnsupportedError(
                f"ExecuTorch can't compile the graph for {soc.name}",
                where=path,
                got=first_line(error),
                todo=advice(),
            ) from error
    outside = sorted({str(n.target) for n in called if "getitem" not in str(n.target)})
    if outside != ["executorch_call_delegate"]:
        raise UnsupportedError(
            "QNN does not take every operator", where=path, got=", ".join(outside)
        )
    path.write_bytes(buffer)


def open_pte(
    path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A compiled graph, of inputs by name to outputs by name."""
    _require_sdk()
    with quiet(), no_output():
        from executorch.extension.pybindings import portable_lib

        module = portable_lib._load_for_executorch(str(path))

    def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with no_output():
            made = module.forward([given[name].contiguous() for name in inputs])
        return dict(zip(outputs, (own.clone() for own in made), strict=True))

    return run
