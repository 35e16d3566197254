"""The states of a package: their names and shapes, and whether MLState stores them between calls.

Keys and values are `[1, K, C, D]`. The filter's last inputs are `[1, taps - 1, H]`, oldest first.
The last dim is H, because the Neural Engine requires a multiple of 32 there (apple/coremltools
issue 2631).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lfmc.model import StateSpec

DIGIT = 64  # base of the digits of a position; every digit has its own rotary tables
LAYOUTS = ("mlstate", "conv-io")
NAMES = {"conv": "conv_state", "key": "key_cache", "value": "value_cache"}


@dataclass(frozen=True)
class PackageState:
    """One state: stored in MLState, or passed as an input `name` and an output `name_out`."""

    name: str
    shape: tuple[int, ...]
    in_mlstate: bool


def package_states(specs: Sequence[StateSpec], layout: str) -> list[PackageState]:
    """Return the states of the package, in the order of the program's states."""
    return [
        PackageState(
            f"{NAMES[spec.kind]}_{spec.layer}",
            (spec.shape[0], spec.shape[2], spec.shape[1]) if spec.kind == "conv" else spec.shape,
            in_mlstate=layout == "mlstate" or spec.kind != "conv",
        )
        for spec in specs
    ]
