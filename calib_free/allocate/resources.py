"""What measuring may use, beside the checkpoint; nothing here changes a plan."""

from __future__ import annotations

from dataclasses import dataclass

from lfmc.machine.cache import NOTHING, Cache
from lfmc.machine.workers import HERE, Workers


@dataclass(frozen=True)
class Resources:
    """Workers for what falls apart by tensor, and a cache."""

    workers: Workers = HERE
    cache: Cache = NOTHING


ALONE = Resources()  # this machine, and no cache
