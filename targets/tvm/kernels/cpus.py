"""Families of CPUs: LLVM targets and instructions for int8 products."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lfmc.errors import UnsupportedError

Dot = Literal["vpdpbusd", "pmaddubsw", "sdot"]

X86, ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"


@dataclass(frozen=True)
class Cpu:
    """An LLVM target, and the instructions of its int8 products.

    `lanes` is the number of 32-bit lanes of a vector. `flags` are Linux's names, in /proc/cpuinfo,
    of the features that a machine must have. `tile` is the number of tokens that a product of many
    tokens takes together. `ahead` is the distance in bytes at which a product of one token
    prefetches codes. `tests/benchmarks/tune_tvm.py` found the best values of `tile` and `ahead`.
    """

    name: str
    triple: str
    mcpu: str
    mattr: tuple[str, ...]
    dot: Dot
    lanes: int
    flags: tuple[str, ...]
    tile: int
    ahead: int = 4096

    def __str__(self) -> str:
        return self.name


# Fastest first.
CPUS: Mapping[str, Cpu] = {
    cpu.name: cpu
    for cpu in (
        Cpu(
            "avx512-vnni",
            X86,
            "x86-64-v4",
            ("+avx512vnni",),
            "vpdpbusd",
            16,
            ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "fma", "f16c"),
            6,
        ),
        Cpu(
            "avx512",
            X86,
            "x86-64-v4",
            (),
            "pmaddubsw",
            16,
            ("avx512f", "avx512bw", "avx512vl", "fma", "f16c"),
            8,
        ),
        Cpu(
            "avx-vnni",
            X86,
            "x86-64-v3",
            ("+avxvnni",),
            "vpdpbusd",
            8,
            ("avx2", "avx_vnni", "fma", "f16c"),
            4,
        ),
        Cpu("avx2", X86, "x86-64-v3", (), "pmaddubsw", 8, ("avx2", "fma", "f16c"), 4),
        Cpu(
            "neon-dotprod",
            ARM,
            "generic",
            ("+neon", "+dotprod", "+fullfp16"),
            "sdot",
            4,
            ("asimd", "asimddp", "asimdhp"),
            4,
        ),
    )
}


HOST = CPUS["avx2"]  # for the host code of a GPU library: any x86-64 of the last ten years


def this_cpu() -> Cpu:
    """Return the family of this machine. Raises `UnsupportedError` if no family matches."""
    for cpu in CPUS.values():
        if runs_here(cpu):
            return cpu
    raise UnsupportedError(
        "lfmc has no kernels for the CPU of this machine",
        expected=", ".join(CPUS),
        got=platform.machine(),
        todo="select the CPU family of the library: --device cpu:avx2",
    )


def runs_here(cpu: Cpu) -> bool:
    """Return whether this machine can run code for a family."""
    return cpu.triple.startswith(platform.machine()) and machine_flags().issuperset(cpu.flags)


def machine_flags() -> frozenset[str]:
    """Return the features of this machine's CPU as Linux lists them; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
