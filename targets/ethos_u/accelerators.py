"""Ethos-U NPUs, and the systems for which Vela estimates their speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """An NPU. `system` and `memory` are sections of Vela's `Arm/vela.ini`.

    `wide` is true if the NPU supports products of two 16-bit values.
    """

    name: str
    system: str
    memory: str
    wide: bool


_U55 = "Ethos_U55_High_End_Embedded", "Shared_Sram", False
_U85 = "Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB", True
_ALL = (
    *(Accelerator(f"ethos-u85-{macs}", *_U85) for macs in (256, 128, 512, 1024, 2048)),
    *(Accelerator(f"ethos-u55-{macs}", *_U55) for macs in (128, 32, 64, 256)),
)
ACCELERATORS: Mapping[str, Accelerator] = {accelerator.name: accelerator for accelerator in _ALL}
