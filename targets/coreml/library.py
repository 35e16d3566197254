"""coremltools, imported once and kept quiet: its warnings are about what is not used here."""

from __future__ import annotations

import logging
from typing import Any

from lfmc.machine.quiet import quiet
from lfmc.targets.base import require


def coremltools() -> Any:
    """The library. Raises `UnsupportedError` where it is missing.

    It warns that torch is newer than what its own converter was tested with (that converter is not
    used) and that Apple's runtime is missing on other systems (it is not called there).
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with quiet():
        return require("coremltools", "coreml")
