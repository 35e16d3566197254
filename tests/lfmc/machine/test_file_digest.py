from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from lfmc.machine import file_digest
from lfmc.machine.file_digest import sha256_of_files


def test_it_is_the_sha256_of_the_concatenated_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digest, "BLOCK_NBYTES", 8)
    contents = [random.Random(size).randbytes(size) for size in (0, 3, 8, 100, 16)]
    files = [tmp_path / str(index) for index in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    assert sha256_of_files(files) == hashlib.sha256(b"".join(contents)).hexdigest()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        sha256_of_files([tmp_path / "absent"])
