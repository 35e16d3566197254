"""The size limit of an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from lfmc.errors import InputError


@dataclass(frozen=True)
class Budget:
    """A limit in bits per parameter, in bytes, or both (the smaller one applies).

    Every byte counts: codes, scales, zero points, padding, float tensors and the graph reserve.
    Raises `InputError` if both limits are None or one is not positive.
    """

    bits_per_weight: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        limits = [v for v in (self.bits_per_weight, self.max_bytes) if v is not None]
        if not limits or not all(v > 0 and isfinite(v) for v in limits):
            raise InputError(
                "a budget needs a positive number of bits per weight, or of bytes",
                got=f"bits per weight {self.bits_per_weight}, bytes {self.max_bytes}",
            )

    def limit(self, num_params: int) -> int:
        """Return the limit in bytes for a model of `num_params` parameters, rounded down."""
        limits = []
        if self.bits_per_weight is not None:
            limits.append(int(self.bits_per_weight * num_params / 8))
        if self.max_bytes is not None:
            limits.append(self.max_bytes)
        return min(limits)
