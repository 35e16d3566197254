"""Results of measuring, kept between runs and found again by what they were made from.

A key is the SHA-256 of everything that a result depends on: the bytes of tensors (or the
fingerprint of the checkpoint), the rule that made it with its version, and its options. So a
stale result is never found, and nothing has to be invalidated.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cache:
    """JSON values by key, one file each under `folder`; None remembers nothing.

    An entry that can't be read, or that is not what was written, counts as absent. A value that
    can't be written (a full disk, a folder without permission) is not kept: a cache saves time,
    and no result depends on it.
    """

    folder: Path | None

    def get(self, key: str) -> Any | None:
        """The value that was put under `key`; None where there is none."""
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(self.folder, key).read_bytes())
            text = entry["value"]
            return json.loads(text) if entry["digest"] == _digest(key, text) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value (floats come back to the bit), written whole or not at all."""
        if self.folder is None:
            return
        text = json.dumps(value)
        path = self._path(self.folder, key)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{uuid4().hex}.partial")
            try:
                entry = {"digest": _digest(key, text), "value": text}
                partial.write_text(json.dumps(entry), encoding="utf-8")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def _path(self, folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


NOTHING = Cache(None)


def cache_folder() -> Path:
    """`$LFMC_CACHE`, else `$XDG_CACHE_HOME/lfmc`, else `~/.cache/lfmc`; it need not exist."""
    own = os.environ.get("LFMC_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lfmc"


def default_cache() -> Cache:
    """The cache in `cache_folder`, which is made when first written to."""
    return Cache(cache_folder())


def key_of(rule: str, *parts: object) -> str:
    """SHA-256 of a rule (its name and version) and of what it was given: JSON values, in order."""
    return hashlib.sha256(json.dumps([rule, *parts]).encode()).hexdigest()


def machine() -> list[object]:
    """What the last bits of a sum of floats depend on, beside what is summed."""
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over a CPU tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()
