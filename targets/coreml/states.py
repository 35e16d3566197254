"""The states of a package: their names, their shapes, and who keeps them between calls.

Keys and values are `[1, K, C, D]`. The filter's last inputs are `[1, taps - 1, H]`, oldest first:
the last dim is H, because the Neural Engine wants it to be a multiple of 32 (apple/coremltools
issue 2631).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lfmc.model import StateSpec

DIGIT = 64  # positions are taken apart into digits of this base, with rotary tables for each
LAYOUTS = ("mlstate", "conv-io")
NAMES = {"conv": "conv_state", "key": "key_cache", "value": "value_cache"}


@dataclass(frozen=True)
class PackageState:
    """One state: held in MLState where `kept`, else an input `name` and an output `name_out`."""

    name: str
    shape: tuple[int, ...]
    kept: bool


def package_states(specs: Sequence[StateSpec], layout: str) -> list[PackageState]:
    """The program's states as the package has them, in the same order."""
    return [
        PackageState(
            f"{NAMES[spec.kind]}_{spec.layer}",
            (spec.shape[0], spec.shape[2], spec.shape[1]) if spec.kind == "conv" else spec.shape,
            kept=layout == "mlstate" or spec.kind != "conv",
        )
        for spec in specs
    ]
