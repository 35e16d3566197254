"""ExecuTorch, imported once, quietly, with the operators that lfmc's programs use."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from lfmc.machine.quiet import quiet
from lfmc.targets.base import require

EXTRA = "executorch"


def load_operators() -> None:
    """Make `llama::` and `quantized_decomposed::` operators known to the runtime.

    Raises `UnsupportedError` where a package is missing.
    """
    with quiet(), mute():
        require("executorch.extension.llm.custom_ops.custom_ops", EXTRA)
        require("executorch.kernels.quantized", EXTRA)


@contextlib.contextmanager
def mute() -> Iterator[None]:
    """Keep away what is written past Python's stderr: by the runtime's C++ at every call ("no temp
    allocator"), and by torch's own log."""
    sys.stderr.flush()
    own = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
