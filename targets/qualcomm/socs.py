"""Chips, as QNN numbers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Soc:
    """`model` is QNN's number of a chip, `arch` the version of its Hexagon."""

    name: str
    model: int
    arch: int


_ALL = (
    Soc("sm8750", 69, 79),  # Snapdragon 8 Elite
    Soc("sm8650", 57, 75),  # Snapdragon 8 Gen 3
)
SOCS: Mapping[str, Soc] = {soc.name: soc for soc in _ALL}
