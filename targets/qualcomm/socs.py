"""Chips and their numbers in QNN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Soc:
    """A chip: `model` is QNN's number of it, and `arch` the version of its Hexagon NPU."""

    name: str
    model: int
    arch: int


_ALL = (
    Soc("sm8750", 69, 79),  # Snapdragon 8 Elite
    Soc("sm8650", 57, 75),  # Snapdragon 8 Gen 3
)
SOCS: Mapping[str, Soc] = {soc.name: soc for soc in _ALL}
