"""Codes on disk: one file per quantized tensor, memory-mapped when it is read.

The search for codes is slow, and lowering, reading back and parity use the same codes. A file name
is the SHA-256 of everything that the codes depend on, so a killed export leaves files that the next
one reads, and a file is never stale.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.calib_free.grid.packed_tensor import PackedTensor
from lfmc.calib_free.plan.bit_plan import PlanRow
from lfmc.machine.cache import cache_folder, cache_key, numeric_environment, tensor_digest
from lfmc.version import __version__

RULE = "codes of a planned tensor 1"
SUFFIX = ".safetensors"
MAX_AGE = 3 * 24 * 3600  # seconds after which the files of a killed export are removed
MAX_NBYTES = 32 << 30  # of the files of earlier exports; the oldest are removed first
RESERVE_NBYTES = 1 << 30  # free bytes of the disk that codes never take


class StoredCodes:
    """Codes, scales and zero points of tensors in a folder, by a key of their content.

    Without a folder, a temporary one is created for the first tensor and removed with the object. A
    tensor that can't be written (a full disk, a folder without permission) stays in memory, because
    no result depends on the files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._keys: set[str] = set()  # of the files that this object wrote or checked

    def load(self, key: str, row: PlanRow) -> PackedTensor | None:
        """Return a tensor of an earlier `store`, or None if its file is absent or damaged.

        The digest of a file that this object did not write is checked when it is read first.
        """
        if self._folder is None:
            return None
        try:
            with safe_open(self._path(self._folder, key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                digest = (file.metadata() or {}).get("digest")
        except (SafetensorError, OSError):
            return None
        if key not in self._keys and digest != _digest(tensors):
            return None
        self._keys.add(key)
        return _packed(row, tensors)

    def store(self, key: str, row: PlanRow, packed: PackedTensor) -> PackedTensor:
        """Write a tensor atomically, and return it as memory-mapped from its file."""
        tensors = {"codes": packed.codes, "scales": packed.scales}
        if packed.zeros is not None:
            tensors["zeros"] = packed.zeros
        # Parts of fitted tensors may be views with strides, which safetensors refuses to write.
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with suppress(OSError, SafetensorError):
            folder = self._create_folder()
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            if shutil.disk_usage(folder).free < nbytes + RESERVE_NBYTES:
                return packed
            partial = folder / f"{uuid4().hex}.partial"
            try:
                save_file(tensors, partial, {"digest": _digest(tensors)})
                partial.replace(self._path(folder, key))
            finally:
                partial.unlink(missing_ok=True)
            self._keys.add(key)
        return self.load(key, row) or packed

    def remove(self) -> None:
        """Remove the files that this object wrote or read, and the folder if it is empty."""
        if self._folder is None:
            return
        for key in self._keys:
            with suppress(OSError):  # of a system that can't remove a mapped file
                self._path(self._folder, key).unlink(missing_ok=True)
        self._keys.clear()
        with suppress(OSError):
            self._folder.rmdir()

    def _create_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lfmc-codes-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def _path(self, folder: Path, key: str) -> Path:
        return folder / f"{key}{SUFFIX}"


@contextmanager
def open_codes(*, cache: bool) -> Iterator[StoredCodes]:
    """Yield the codes in lfmc's cache folder, and remove those that the block used if it succeeds.

    If the block fails, the files stay, so that another export with the same rows starts from them.
    Without `cache`, the codes are in a temporary folder, which is removed in any case.
    """
    if not cache:
        with tempfile.TemporaryDirectory(prefix="lfmc-codes-", ignore_cleanup_errors=True) as path:
            yield StoredCodes(Path(path))
        return
    folder = cache_folder() / "codes"
    remove_old_codes(folder)
    codes = StoredCodes(folder)
    yield codes
    codes.remove()


def remove_old_codes(folder: Path) -> None:
    """Remove the files of exports that did not end: old ones, and the oldest above a total size."""
    files = []
    with suppress(OSError):
        files = [(path.stat(), path) for path in folder.iterdir()]
    files.sort(key=lambda entry: entry[0].st_mtime, reverse=True)
    oldest, total = time.time() - MAX_AGE, 0
    for status, path in files:
        total += status.st_size
        if status.st_mtime < oldest or total > MAX_NBYTES:
            with suppress(OSError):
                path.unlink()


def codes_key(fingerprint: str, row: PlanRow) -> str:
    """Return the key of a quantized row of the checkpoint with this fingerprint."""
    parts = (row.name, row.format, row.grid, row.importance, row.digest)
    return cache_key(RULE, __version__, *numeric_environment(), fingerprint, *parts)


def _digest(tensors: dict[str, Tensor]) -> str:
    return cache_key(RULE, {name: tensor_digest(tensors[name]) for name in sorted(tensors)})


def _packed(row: PlanRow, tensors: dict[str, Tensor]) -> PackedTensor:
    number_format = parse_format(row.format)
    assert isinstance(number_format, Format)  # other rows have no codes
    return PackedTensor(
        number_format,
        (row.shape[0], row.shape[1]),
        tensors["codes"],
        tensors["scales"],
        tensors.get("zeros"),
    )
