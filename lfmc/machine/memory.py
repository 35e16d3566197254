"""Memory of the machine."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

M_MMAP_THRESHOLD = -3  # of malloc.h


def installed_nbytes(device: str = "cpu") -> int:
    """Return the bytes of memory of the machine, or of its first GPU for "cuda"."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_nbytes() -> int:
    """Return the largest resident memory of this process so far, with files that it maps."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def return_freed_memory() -> None:
    """Make glibc return large freed blocks to the system, as other C libraries do by default.

    When a block is freed, glibc raises its mmap threshold to the size of that block, up to 32 MiB.
    Smaller blocks then stay in the heap, which fragments: jobs that allocate and free many matrices
    would use twice the memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
