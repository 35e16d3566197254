"""What AMD's loader will be told of the kernels in a file, read back from it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lfmc.errors import GateError
from lfmc.targets.base import require

ELF = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
AMDGPU = 224  # as a machine of ELF
LDS = 64 << 10  # bytes that a block's threads can share
REGISTERS = {32: 256, 64: 512}  # of a thread, by wave: CDNA's have as many again to add up in


def check_code_objects(
    path: Path, arch: str, wave: int, extra: str, *, may_spill: bool = False
) -> dict[str, Any]:
    """Facts of a file's kernels for the manifest; `extra` is lfmc's that reads them.

    Raises `GateError` where they are for another GPU or wave size, do not fit its registers or the
    memory that a block shares, or, unless they `may_spill`, keep registers in memory.
    """
    found = list(_code_objects(path, extra))
    kernels = [kernel for notes in found for kernel in notes["amdhsa.kernels"]]
    targets = {str(notes["amdhsa.target"]).rpartition("-")[2] for notes in found}
    wrong = [f"{kernel['.name']}: {what}" for kernel in kernels for what in _faults(kernel, wave)]
    spilling = [kernel[".name"] for kernel in kernels if _spills(kernel)]
    if not may_spill:
        wrong += [f"{name}: registers kept in memory" for name in spilling]
    if not kernels or targets != {arch} or wrong:
        raise GateError(
            "the code for the GPU is not what it has to be",
            where=path,
            expected=f"kernels for {arch}, in waves of {wave}",
            got="; ".join(wrong[:3]) or f"{len(kernels)} for {', '.join(targets) or 'none'}",
            todo="this is a fault of lfmc; please report it",
        )
    return {
        "kernels": len(kernels),
        "wave": wave,
        "spilling": len(spilling),
        "most_registers": max(kernel[".vgpr_count"] for kernel in kernels),
        "most_shared_nbytes": max(kernel[".group_segment_fixed_size"] for kernel in kernels),
    }


def _faults(kernel: Mapping[str, Any], wave: int) -> Iterator[str]:
    if kernel[".wavefront_size"] != wave:
        yield f"waves of {kernel['.wavefront_size']} threads"
    if kernel[".group_segment_fixed_size"] > LDS:
        yield f"{kernel['.group_segment_fixed_size']} bytes shared"
    if kernel[".vgpr_count"] > REGISTERS[wave]:
        yield f"{kernel['.vgpr_count']} registers"


def _spills(kernel: Mapping[str, Any]) -> bool:
    return bool(kernel[".vgpr_spill_count"] or kernel[".private_segment_fixed_size"])


def _code_objects(path: Path, extra: str) -> Iterator[Mapping[str, Any]]:
    """The notes of every code object in a file."""
    elf, msgpack = require("elftools.elf.elffile", extra), require("msgpack", extra)
    data, at = path.read_bytes(), -1
    while (at := data.find(ELF, at + 1)) >= 0:
        if int.from_bytes(data[at + 18 : at + 20], "little") != AMDGPU:
            continue
        for segment in elf.ELFFile(io.BytesIO(data[at:])).iter_segments("PT_NOTE"):
            for note in segment.iter_notes():
                if note["n_name"] == "AMDGPU":
                    yield msgpack.unpackb(note["n_descdata"])
