"""Workers and cache for measurements; they never change a plan."""

from __future__ import annotations

from dataclasses import dataclass

from lfmc.machine.cache import NO_CACHE, Cache
from lfmc.machine.workers import LOCAL_WORKERS, Workers


@dataclass(frozen=True)
class Resources:
    """Workers for measurements that are independent for each tensor, and a cache."""

    workers: Workers = LOCAL_WORKERS
    cache: Cache = NO_CACHE


LOCAL = Resources()  # this machine, without a cache
