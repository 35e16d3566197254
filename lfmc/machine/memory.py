"""Memory of this machine, and the check that a job fits in it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from lfmc.errors import UnsupportedError

M_MMAP_THRESHOLD = -3  # of malloc.h


def installed_nbytes(device: str = "cpu") -> int:
    """Bytes of memory that this machine, or its first GPU for "cuda", has."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(
    model: Path, num_params: int, needed: int, what: str, todo: str, device: str = "cpu"
) -> None:
    """Raise `UnsupportedError`, with both numbers, if `needed` bytes exceed the memory.

    `model` is the checkpoint's folder and `num_params` its number of parameters, for the message.
    """
    installed = installed_nbytes(device)
    if needed > installed:
        each = needed / num_params
        place = "on the GPU" if device == "cuda" else "installed"
        raise UnsupportedError(
            f"{what} of this model does not fit in memory",
            where=model,
            expected=f"{needed / 2**30:.1f} GiB ({each:.0f} bytes a parameter)",
            got=f"{installed / 2**30:.1f} GiB {place}",
            todo=todo,
        )


def return_freed_memory() -> None:
    """Have large blocks go back to the system when they are freed (glibc; elsewhere they do).

    glibc takes a freed block's size as the new limit below which blocks stay in its heap, up to 32
    MiB, and holes of every size then add up: twice the memory, where matrices come and go.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
