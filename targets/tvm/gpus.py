"""GPUs that TVM compiles for, and the tools that compilation needs on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# The folders of AMD's device libraries in Debian's and in AMD's packages.
BITCODE = (Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode"), Path("/opt/rocm/amdgcn/bitcode"))
LINKERS = ("ld.lld-22", "/opt/rocm/llvm/bin/ld.lld")  # older versions do not know the object format


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. `wave` is the number of threads of a wave, for AMD GPUs."""

    name: str
    kind: Literal["rocm", "opencl", "cuda"]
    arch: str = ""
    wave: int = 32

    def __str__(self) -> str:
        return self.name


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("rocm:gfx1100", "rocm", "gfx1100"),  # RDNA 3
        Gpu("rocm:gfx1151", "rocm", "gfx1151"),  # RDNA 3.5
        Gpu("rocm:gfx942", "rocm", "gfx942", wave=64),  # CDNA 3
        Gpu("opencl", "opencl"),
        Gpu("cuda", "cuda", "sm_80"),
    )
}


def bitcode_paths(gpu: Gpu) -> list[Path]:
    """Return the paths of AMD's device libraries for a GPU: functions, and settings of the GPU."""
    folder = next((path for path in BITCODE if path.is_dir()), BITCODE[0])
    names = (
        "ocml",
        "oclc_daz_opt_off",
        "oclc_correctly_rounded_sqrt_on",
        "oclc_finite_only_off",
        "oclc_unsafe_math_off",
        f"oclc_wavefrontsize64_{'on' if gpu.wave == 64 else 'off'}",
        "oclc_abi_version_500",
    )
    return [folder / f"{name}.bc" for name in names]


def missing_gpu_tools(gpu: Gpu) -> list[str]:
    """Return the tools that this machine lacks to compile for a GPU."""
    missing = []
    if gpu.kind == "rocm":
        if not all(path.is_file() for path in bitcode_paths(gpu)):
            missing.append("AMD's device libraries (Debian: rocm-device-libs)")
        if not any(map(shutil.which, LINKERS)):
            missing.append("ld.lld of LLVM 22 (Debian: lld-22)")
    if gpu.kind == "cuda" and shutil.which("nvcc") is None:
        missing.append("nvcc (NVIDIA's CUDA toolkit)")
    return missing
