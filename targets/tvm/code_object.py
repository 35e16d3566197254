"""What AMD's loader will be told of the kernels in a library, read back from the file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lfmc.errors import GateError
from lfmc.targets.base import require
from lfmc.targets.tvm.gpus import Gpu

ELF = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
AMDGPU = 224  # as a machine of ELF
LDS = 64 << 10  # bytes that a block's threads can share
REGISTERS = 256  # of a thread, with 256 threads a block


def check_code_objects(path: Path, gpu: Gpu) -> dict[str, Any]:
    """Facts of a library's kernels for the manifest.

    Raises `GateError` where they are for another GPU or wave size, do not fit its registers or the
    memory that a block shares, or keep registers in memory.
    """
    found = list(_code_objects(path))
    kernels = [kernel for notes in found for kernel in notes["amdhsa.kernels"]]
    targets = {str(notes["amdhsa.target"]).rpartition("-")[2] for notes in found}
    wrong = [
        f"{kernel['.name']}: {what}" for kernel in kernels for what in _faults(kernel, gpu.wave)
    ]
    if not kernels or targets != {gpu.arch} or wrong:
        raise GateError(
            "the library's code for the GPU is not what it has to be",
            where=path,
            expected=f"kernels for {gpu.arch}, in waves of {gpu.wave}",
            got="; ".join(wrong[:3]) or f"{len(kernels)} for {', '.join(targets) or 'none'}",
            todo="this is a fault of lfmc; please report it",
        )
    return {
        "kernels": len(kernels),
        "wave": gpu.wave,
        "most_registers": max(kernel[".vgpr_count"] for kernel in kernels),
        "most_shared_nbytes": max(kernel[".group_segment_fixed_size"] for kernel in kernels),
    }


def _faults(kernel: Mapping[str, Any], wave: int) -> Iterator[str]:
    if kernel[".wavefront_size"] != wave:
        yield f"waves of {kernel['.wavefront_size']} threads"
    if kernel[".group_segment_fixed_size"] > LDS:
        yield f"{kernel['.group_segment_fixed_size']} bytes shared"
    if kernel[".vgpr_count"] > REGISTERS:
        yield f"{kernel['.vgpr_count']} registers"
    if kernel[".vgpr_spill_count"] or kernel[".private_segment_fixed_size"]:
        yield "registers kept in memory"


def _code_objects(path: Path) -> Iterator[Mapping[str, Any]]:
    """The notes of every code object in a file."""
    elf, msgpack = require("elftools.elf.elffile", "tvm"), require("msgpack", "tvm")
    data, at = path.read_bytes(), -1
    while (at := data.find(ELF, at + 1)) >= 0:
        if int.from_bytes(data[at + 18 : at + 20], "little") != AMDGPU:
            continue
        for segment in elf.ELFFile(io.BytesIO(data[at:])).iter_segments("PT_NOTE"):
            for note in segment.iter_notes():
                if note["n_name"] == "AMDGPU":
                    yield msgpack.unpackb(note["n_descdata"])
