"""Read and check the metadata of the AMD GPU kernels in a file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lfmc.errors import GateError
from lfmc.targets.base import require

ELF = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
AMDGPU = 224  # the ELF machine type
LDS = 64 << 10  # bytes of shared memory per block
# Registers per thread, by wave size. CDNA has as many accumulation registers in addition.
REGISTERS = {32: 256, 64: 512}


def check_code_objects(
    path: Path, arch: str, wave: int, extra: str, *, may_spill: bool = False
) -> dict[str, Any]:
    """Return facts about the kernels of a file for the manifest.

    `extra` is the extra of lfmc that installs the readers. Raises `GateError` if the kernels are
    for another GPU or wave size, need more registers or shared memory than the GPU has, or spill
    registers to memory although they must not (`may_spill`).
    """
    code_objects = list(_code_objects(path, extra))
    kernels = [kernel for notes in code_objects for kernel in notes["amdhsa.kernels"]]
    targets = {str(notes["amdhsa.target"]).rpartition("-")[2] for notes in code_objects}
    faults = [
        f"{kernel['.name']}: {fault}" for kernel in kernels for fault in _faults(kernel, wave)
    ]
    spilling = [kernel[".name"] for kernel in kernels if _spills(kernel)]
    if not may_spill:
        faults += [f"{name}: registers spilled to memory" for name in spilling]
    if not kernels or targets != {arch} or faults:
        raise GateError(
            "the GPU kernels are not valid for this GPU",
            where=path,
            expected=f"kernels for {arch}, in waves of {wave}",
            got="; ".join(faults[:3]) or f"{len(kernels)} for {', '.join(targets) or 'none'}",
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
    """Yield the metadata notes of every code object in a file."""
    elf, msgpack = require("elftools.elf.elffile", extra), require("msgpack", extra)
    data, start = path.read_bytes(), -1
    while (start := data.find(ELF, start + 1)) >= 0:
        if int.from_bytes(data[start + 18 : start + 20], "little") != AMDGPU:
            continue
        for segment in elf.ELFFile(io.BytesIO(data[start:])).iter_segments("PT_NOTE"):
            for note in segment.iter_notes():
                if note["n_name"] == "AMDGPU":
                    yield msgpack.unpackb(note["n_descdata"])
