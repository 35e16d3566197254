"""Small bundles as apps open them: of the bundled checkpoint, unproven."""

from __future__ import annotations

from pathlib import Path

import lfmc
from lfmc.bundle.bundle import Bundle


def app_bundle(output: Path, target: str, bits: str, **choices: str) -> Bundle:
    """An export to `output` for 64 tokens; `choices` are the target's options."""
    return lfmc.export(
        target=target,
        bits=bits,
        output=output,
        check="off",
        context=64,
        target_options=choices,
    )
