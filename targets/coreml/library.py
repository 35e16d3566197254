"""Import coremltools without its warnings, which concern features that lfmc does not use."""

from __future__ import annotations

import logging
from typing import Any

from lfmc.machine.quiet import quiet
from lfmc.targets.base import require


def coremltools() -> Any:
    """Return the library. Raises `UnsupportedError` if it is not installed.

    It warns that torch is newer than the version its converter was tested with (lfmc does not use
    this converter), and that Apple's runtime is missing on other systems (lfmc does not call it
    there).
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with quiet():
        return require("coremltools", "coreml")
