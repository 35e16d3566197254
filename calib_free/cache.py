"""Where lfmc keeps what it need not compute twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$LFMC_CACHE`, else `$XDG_CACHE_HOME/lfmc`, else `~/.cache/lfmc`; made where missing."""
    named = os.environ.get("LFMC_CACHE")
    if named:
        folder = Path(named)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lfmc"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
