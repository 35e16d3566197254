"""Constants as they lie in a .pte: what their bytes mean, and finding them there.

A program keeps XNNPACK's constants by a hash of their bytes and others in a list, without names; so
lfmc calls each by what it is, its shape and its SHA-256: `codes:64x32:e3b0c4...`.
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
class Constants:
    """What a program holds: delegates, their constants by the names that they use, and all other
    constants, each with what fills up the file behind it to the next."""

    delegates: Sequence[bytes]
    named: Mapping[str, bytes]
    others: Sequence[bytes]

    @cached_property
    def by_hash(self) -> Mapping[str, bytes]:
        """Delegates' constants by the SHA-256 of their bytes as they are now."""
        return {hash_of(data): data for data in self.named.values()}


def stored(
    kind: str, value: Tensor, part: str, sources: tuple[str, ...], copy: int = 0
) -> StoredTensor:
    """A constant of the program, of which `value` is what its bytes are."""
    data = as_bytes(value)
    shape = "x".join(str(size) for size in value.shape)
    name = f"{kind}:{shape}:{hash_of(data)}"
    order: Arrangement = "rows"
    return StoredTensor(name, part, sources, order, len(data), copy)


def matrix_parts(packed: PackedTensor, sources: tuple[str, ...]) -> list[StoredTensor]:
    """What XNNPACK keeps of a matrix: 4-bit codes as a bit stream a row, 8-bit codes signed."""
    if packed.format.bits == 4:
        own = stored("codes", packed.packed_codes(), "codes", sources)
    else:
        own = stored("signed", packed.signed_codes(), "codes", sources)
    return [own, stored(packed.format.scale_dtype, packed.scales, "scales", sources)]


def read(folder: Path, wanted: StoredTensor) -> Tensor:
    """A constant as it lies on disk, in the form of `PackedTensor`'s parts."""
    kind, shape, key = wanted.name.split(":")
    sizes = [int(size) for size in shape.split("x")]
    dtype = STORED_AS[kind]
    nbytes = math.prod(sizes) * dtype.itemsize
    held = constants(folder / MODEL)
    data = held.by_hash.get(key)
    for other in held.others if data is None else ():
        if nbytes <= len(other) < nbytes + ALIGNMENT and hash_of(other[:nbytes]) == key:
            data = other[:nbytes]
    if data is None or len(data) != nbytes:
        raise InputError(f"the program has no constant '{wanted.name}'", where=folder / MODEL)
    raw = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    return DECODE[kind](raw.view(dtype).view(sizes))


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _signed(value: Tensor) -> Tensor:
    return pack_bits((value.to(torch.int16) + 128).to(torch.uint8), 8)


def _swapped(value: Tensor) -> Tensor:
    """Nibbles whose first is the higher, as codes with the first one lowest."""
    return (value << 4) | (value >> 4)


def _taps(value: Tensor) -> Tensor:
    """`[taps, H]` as the checkpoint has it, `[H, 1, taps]`."""
    return value.T.unsqueeze(1).contiguous()


def _as_is(value: Tensor) -> Tensor:
    return value


STORED_AS: Mapping[str, torch.dtype] = {
    "codes": torch.uint8,
    "signed": torch.int8,
    "swapped": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "row_scales": torch.float32,  # without a dim for the one group
    "taps": torch.float32,
}
DECODE: Mapping[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(STORED_AS, _as_is),
    "signed": _signed,
    "swapped": _swapped,
    "float16": lambda value: value.to(torch.bfloat16),
    "row_scales": lambda value: value.unsqueeze(1),
    "taps": _taps,
}


def constants(path: Path) -> Constants:
    """Every constant of a program, as it lies in the file."""
    if not path.is_file():
        raise InputError("there is no ExecuTorch program", where=path)
    return _constants(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _constants(path: Path, stamp: int) -> Constants:
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
    return Constants(delegates, blobs, others)
