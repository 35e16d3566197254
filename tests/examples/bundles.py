"""Export small bundles of the bundled checkpoint for apps, without parity checks."""

from __future__ import annotations

from pathlib import Path

import lfmc
from lfmc.bundle.bundle import Bundle


def app_bundle(output: Path, target: str, bits: str, **options: str) -> Bundle:
    """Export to `output` for 64 tokens, with the target's `options`."""
    return lfmc.export(
        target=target,
        bits=bits,
        output=output,
        check="off",
        context=64,
        target_options=options,
    )
