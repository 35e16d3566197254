"""NPUs, and the systems that Vela estimates them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """`system` and `memory` are sections of Vela's own `Arm/vela.ini`; `wide` where products of two
    16-bit values run on the NPU."""

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
ACCELERATORS: Mapping[str, Accelerator] = {own.name: own for own in _ALL}
