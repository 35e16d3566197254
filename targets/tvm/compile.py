"""From a Relax module to a shared library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule, relax

from lfmc.errors import UnsupportedError, first_line
from lfmc.targets.tvm.cpus import Cpu


def compile_library(module: IRModule, cpu: Cpu, path: Path) -> None:
    """Compile for a CPU and link; raises `UnsupportedError` where there is no linker."""
    spec = {"kind": "llvm", "mtriple": cpu.triple, "mcpu": cpu.mcpu, "mattr": list(cpu.mattr)}
    target = tvm.target.Target(spec)
    with tvm.transform.PassContext(opt_level=3):
        made = tvm.compile(module, target, relax_pipeline=_pipeline())
    try:
        made.export_library(str(path))
    except RuntimeError as error:
        raise UnsupportedError(
            "the library can't be linked",
            got=first_line(error),
            todo="install a C++ compiler (g++, or clang++)",
        ) from error


def _pipeline() -> Any:
    """What TVM does with a module of kernels: nothing is fused or scheduled any more."""
    passes = relax.transform
    return tvm.transform.Sequential(
        [
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            passes.StaticPlanBlockMemory(),
            passes.LowerAllocTensor(),
            passes.KillAfterLastUse(),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            passes.AttachGlobalSymbol(),
        ]
    )
