"""Results that all processes of one test run share: each is made once, by whoever asks first."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Result = TypeVar("Result")


class RunCache:
    """A folder of results, keyed by what they are made from; it lives as long as the test run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def make_once(self, key: object, make: Callable[[Path], Result]) -> tuple[Path, Result]:
        """Return the folder that `make` filled and what it returned, which must be picklable.

        `key` must contain everything that the result depends on. Tests must not change the folder.
        """
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        folder, result_file = self._folder / name, self._folder / f"{name}.pickle"
        with FileLock(self._folder / f"{name}.lock"):
            if not result_file.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
                folder.mkdir()
                result_file.write_bytes(pickle.dumps(make(folder)))
        return folder, pickle.loads(result_file.read_bytes())
