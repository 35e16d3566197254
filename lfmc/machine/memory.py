"""Memory of the machine, and the check that a job fits in it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from lfmc.errors import UnsupportedError

M_MMAP_THRESHOLD = -3  # of malloc.h


def installed_nbytes(device: str = "cpu") -> int:
    """Return the bytes of memory of the machine, or of its first GPU for "cuda"."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(
    model: Path, num_params: int, required_nbytes: int, task: str, todo: str, device: str = "cpu"
) -> None:
    """Raise `UnsupportedError` if a task requires more bytes than the machine has.

    `model` is the folder of the checkpoint and `num_params` its number of parameters; the message
    contains both, with the required and installed bytes.
    """
    installed = installed_nbytes(device)
    if required_nbytes > installed:
        per_param = required_nbytes / num_params
        place = "on the GPU" if device == "cuda" else "installed"
        raise UnsupportedError(
            f"{task} of this model does not fit in memory",
            where=model,
            expected=f"{required_nbytes / 2**30:.1f} GiB ({per_param:.0f} bytes a parameter)",
            got=f"{installed / 2**30:.1f} GiB {place}",
            todo=todo,
        )


def return_freed_memory() -> None:
    """Make glibc return large freed blocks to the system, as other C libraries do by default.

    When a block is freed, glibc raises its mmap threshold to the size of that block, up to 32 MiB.
    Smaller blocks then stay in the heap, which fragments: jobs that allocate and free many matrices
    would use twice the memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
