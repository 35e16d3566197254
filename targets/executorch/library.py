"""Import of ExecuTorch's operator library, without its output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from lfmc.machine.quiet import quiet
from lfmc.targets.base import require

EXTRA = "executorch"


def load_operators() -> None:
    """Register the operators `llama::` with the runtime.

    Raises `UnsupportedError` if a package is missing.
    """
    with quiet(), mute():
        require("executorch.extension.llm.custom_ops.custom_ops", EXTRA)


@contextlib.contextmanager
def mute() -> Iterator[None]:
    """Silence file descriptor 2, which bypasses Python's stderr.

    The runtime's C++ writes to it at every call ("no temp allocator"), and so does torch's log.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
