"""A cache of measurements on disk, addressed by content.

A key is the SHA-256 of everything that a result depends on: the bytes of tensors (or the
fingerprint of the checkpoint), the name and version of the rule that computes it, and its options.
So a lookup never returns a stale result, and entries need no invalidation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

UNFINISHED = "unfinished"  # folder in the cache, with a folder for each unfinished computation
UNFINISHED_SECONDS = 7 * 24 * 3600.0  # unfinished computations are deleted after this time


@dataclass(frozen=True)
class Cache:
    """JSON values by key, one file each under `folder`; None disables the cache.

    An entry that can't be read, or whose digest does not match, counts as absent. A value that
    can't be written (a full disk, a folder without permission) is dropped without an error, because
    the cache only saves time and no result depends on it.
    """

    folder: Path | None

    def get(self, key: str) -> Any | None:
        """Return the value stored under `key`, or None if there is none."""
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(self.folder, key).read_bytes())
            text = entry["value"]
            return json.loads(text) if entry["digest"] == _digest(key, text) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, value: Any) -> None:
        """Store a JSON value atomically; floats keep every bit."""
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

    def intermediate(self, key: str) -> Intermediate:
        """Return the intermediate tensors of the computation `key`.

        Delete those of computations that wrote nothing for a week.
        """
        if self.folder is None:
            return NOT_STORED
        folder = self.folder / UNFINISHED
        with suppress(OSError):
            for other in folder.iterdir():
                if other.name != key and time.time() - other.stat().st_mtime > UNFINISHED_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
        return Intermediate(folder / key)

    def _path(self, folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


@dataclass(frozen=True)
class Intermediate:
    """Tensors that a long computation needs to continue after it was killed.

    Each group of tensors is one file under `folder`; None stores nothing. A group that can't be
    read counts as absent, and a group that can't be written is dropped without an error.
    """

    folder: Path | None

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors stored under `name`, or None if there are none."""
        if self.folder is None:
            return None
        try:
            return load_file(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError):
            return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors atomically."""
        if self.folder is None:
            return
        with suppress(OSError, SafetensorError):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{uuid4().hex}.partial"
            try:
                save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial)
                partial.replace(self.folder / f"{name}.safetensors")
            finally:
                partial.unlink(missing_ok=True)

    def delete(self) -> None:
        """Delete all tensors: the computation is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


NOT_STORED = Intermediate(None)
NO_CACHE = Cache(None)


def cache_folder() -> Path:
    """Return `$LFMC_CACHE`, `$XDG_CACHE_HOME/lfmc` or `~/.cache/lfmc`; it may not exist yet."""
    path = os.environ.get("LFMC_CACHE")
    if path:
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lfmc"


def default_cache() -> Cache:
    """Return the cache in `cache_folder()`; the first write creates the folder."""
    return Cache(cache_folder())


def cache_key(rule: str, *parts: object) -> str:
    """Return the SHA-256 of a rule (its name and version) and of its inputs, JSON values."""
    return hashlib.sha256(json.dumps([rule, *parts]).encode()).hexdigest()


def numeric_environment() -> list[object]:
    """Return the settings that change the last bits of a float sum: torch, CPU, threads."""
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a CPU tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()
