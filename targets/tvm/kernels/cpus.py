"""Families of CPUs: what LLVM compiles for, and how int8 products are done there."""

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

    `lanes` are 32-bit lanes of its vectors, `flags` what Linux calls the features that a machine
    must have, in /proc/cpuinfo. `tile` is how many tokens a product of many takes together, `ahead`
    how many bytes before they are needed a product of one asks for codes: the best that
    `tests/benchmarks/tune_tvm.py` found.
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


# Best first.
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


HOST = CPUS["avx2"]  # runs the host's part of a GPU's library: any x86-64 of the last ten years


def this_cpu() -> Cpu:
    """The family of this machine; raises `UnsupportedError` where it is of none."""
    for cpu in CPUS.values():
        if runs_here(cpu):
            return cpu
    raise UnsupportedError(
        "this machine is of no family of CPUs that lfmc has kernels for",
        expected=", ".join(CPUS),
        got=platform.machine(),
        todo="name the family that the library is for: --device cpu:avx2",
    )


def runs_here(cpu: Cpu) -> bool:
    return cpu.triple.startswith(platform.machine()) and machine_flags().issuperset(cpu.flags)


def machine_flags() -> frozenset[str]:
    """What Linux says of this machine's CPU; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
