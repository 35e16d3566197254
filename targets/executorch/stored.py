"""Names and readback of the constants in a .pte.

A program stores XNNPACK's constants by a hash of their bytes, and others in a list without names.
lfmc therefore names each constant by its kind, its shape and its SHA-256: `codes:64x32:e3b0c4...`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import PackedTensor, pack_bits
from lfmc.errors import InputError, first_line
from lfmc.machine.quiet import quiet
from lfmc.targets.base import Arrangement, StoredTensor
from lfmc.targets.executorch.steps import as_bytes

MODEL = "model.pte"
ALIGNMENT = 256


@dataclass(frozen=True)
class ProgramConstants:
    """The delegates of a program, their constants by key, and all other constants.

    Each of `others` includes the padding up to the next constant of the file.
    """

    delegates: Sequence[bytes]
    named: Mapping[str, bytes]
    others: Sequence[bytes]

    @cached_property
    def by_hash(self) -> Mapping[str, bytes]:
        """Delegates' constants by the SHA-256 of their current bytes."""
        return {hash_bytes(data): data for data in self.named.values()}


def stored_tensor(kind: str, value: Tensor, part: str, sources: tuple[str, ...]) -> StoredTensor:
    """Return the record of a constant whose bytes in the program are those of `value`."""
    data = as_bytes(value)
    shape = "x".join(str(size) for size in value.shape)
    name = f"{kind}:{shape}:{hash_bytes(data)}"
    order: Arrangement = "rows"
    return StoredTensor(name, part, sources, order, len(data))


def stored_matrix(packed: PackedTensor, sources: tuple[str, ...]) -> list[StoredTensor]:
    """Return the records of an XNNPACK matrix: 4-bit codes are a bit stream per row, 8-bit codes
    are signed."""
    if packed.format.bits == 4:
        codes = stored_tensor("codes", packed.packed_codes(), "codes", sources)
    else:
        codes = stored_tensor("signed", packed.signed_codes(), "codes", sources)
    return [codes, stored_tensor(packed.format.scale_dtype, packed.scales, "scales", sources)]


def read(folder: Path, stored: StoredTensor) -> Tensor:
    """Read a constant from disk, in the layout of the parts of `PackedTensor`."""
    kind, shape, key = stored.name.split(":")
    sizes = [int(size) for size in shape.split("x")]
    dtype = STORED_AS[kind]
    nbytes = math.prod(sizes) * dtype.itemsize
    program = read_constants(folder / MODEL)
    data = program.by_hash.get(key)
    for buffer in program.others if data is None else ():
        if nbytes <= len(buffer) < nbytes + ALIGNMENT and hash_bytes(buffer[:nbytes]) == key:
            data = buffer[:nbytes]
    if data is None or len(data) != nbytes:
        raise InputError(f"the program has no constant '{stored.name}'", where=folder / MODEL)
    raw = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    return DECODE[kind](raw.view(dtype).view(sizes))


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decode_signed(value: Tensor) -> Tensor:
    return pack_bits((value.to(torch.int16) + 128).to(torch.uint8), 8)


def _decode_taps(value: Tensor) -> Tensor:
    """Transpose `[taps, H]` to the checkpoint's `[H, 1, taps]`."""
    return value.T.unsqueeze(1).contiguous()


def _unchanged(value: Tensor) -> Tensor:
    return value


STORED_AS: Mapping[str, torch.dtype] = {
    "codes": torch.uint8,
    "signed": torch.int8,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "taps": torch.float32,
}
DECODE: Mapping[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(STORED_AS, _unchanged),
    "signed": _decode_signed,
    "taps": _decode_taps,
}


def read_constants(path: Path) -> ProgramConstants:
    """Read every constant of a program."""
    if not path.is_file():
        raise InputError("there is no ExecuTorch program", where=path)
    return _read_constants(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_constants(path: Path, stamp: int) -> ProgramConstants:
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        with quiet():
            file = deserialize_pte_binary(path.read_bytes())
    except Exception as error:  # the library raises whatever its parsers raise
        raise InputError(
            "executorch can't read the program", where=path, got=first_line(error)
        ) from error
    named, program = file.named_data, file.program
    blobs = {k: bytes(named.buffers[e.buffer_index]) for k, e in named.pte_data.items()}
    delegates = [bytes(delegate.data) for delegate in program.backend_delegate_data]
    others = [bytes(buffer.storage) for buffer in program.constant_buffer]
    return ProgramConstants(delegates, blobs, others)
