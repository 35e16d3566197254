"""SHA-256 of files that are larger than memory, at the speed of the disk or of the hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_NBYTES = 1 << 23


def sha256_of_files(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the concatenated bytes of `files`, in hexadecimal.

    One thread reads the next block while another hashes the current one: neither holds Python's
    lock. Raises `OSError` if a file can't be read.
    """
    digest = hashlib.sha256()
    blocks = _blocks(files)
    with ThreadPoolExecutor(1) as reader:
        current = next(blocks, None)
        while current is not None:
            following = reader.submit(next, blocks, None)
            digest.update(current)
            current = following.result()
    return digest.hexdigest()


def _blocks(files: Sequence[Path]) -> Iterator[memoryview]:
    """Yield the bytes of `files`; a block is overwritten when the second next block is read."""
    buffers = [bytearray(BLOCK_NBYTES), bytearray(BLOCK_NBYTES)]
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while size := stream.readinto(buffers[0]):
                yield memoryview(buffers[0])[:size]
                buffers.reverse()
