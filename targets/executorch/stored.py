"""Names and readback of the constants in a .pte.

A program stores XNNPACK's constants by a hash of their bytes, and others in a list without names.
lfmc therefore names each constant by its kind, its shape and its SHA-256: `codes:64x32:e3b0c4...`.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import pack_bits
from lfmc.errors import InputError, first_line
from lfmc.machine.quiet import quiet
from lfmc.targets.base import Arrangement, StoredTensor
from lfmc.targets.executorch.steps import Matrix, byte_view

MODEL = "model.pte"
ALIGNMENT = 256
HEAD_NBYTES = 64  # of a program, with the header that locates its segments


@dataclass(frozen=True)
class ProgramConstants:
    """The delegates of a program, their constants by key, and all other constants.

    Each of `others` includes the padding up to the next constant of the file.
    """

    delegates: Sequence[bytes]
    named: Mapping[str, memoryview]
    others: Sequence[memoryview]

    @cached_property
    def by_hash(self) -> Mapping[str, memoryview]:
        """Delegates' constants by the SHA-256 of their current bytes."""
        return {hash_bytes(data): data for data in self.named.values()}


def stored_tensor(kind: str, value: Tensor, part: str, sources: tuple[str, ...]) -> StoredTensor:
    """Return the record of a constant whose bytes in the program are those of `value`."""
    data = byte_view(value)
    shape = "x".join(str(size) for size in value.shape)
    name = f"{kind}:{shape}:{hash_bytes(data)}"
    order: Arrangement = "rows"
    return StoredTensor(name, part, sources, order, len(data))


def stored_matrix(matrix: Matrix, sources: tuple[str, ...]) -> list[StoredTensor]:
    """Return the records of an XNNPACK matrix: 4-bit codes are a bit stream per row, 8-bit codes
    are signed."""
    codes = stored_tensor("codes" if matrix.bits == 4 else "signed", matrix.codes, "codes", sources)
    kind = str(matrix.scales.dtype).removeprefix("torch.")
    return [codes, stored_tensor(kind, matrix.scales, "scales", sources)]


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


def hash_bytes(data: bytes | memoryview) -> str:
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
    """Map a program; `stamp` is its mtime. Only the delegates, without constants, are copied."""
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    from executorch.exir._serialize._program import _get_extended_header

    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header = _get_extended_header(bytes(data[:HEAD_NBYTES]))
        if header is None:
            raise ValueError("it has no segments")
        with quiet():
            program = _flatbuffer_to_program(bytes(data[: header.program_size]))
        begin, segments = header.segment_base_offset, []
        for segment in program.segments:
            start = begin + segment.offset
            if start + segment.size > len(data):
                raise ValueError(f"it has {len(data)} bytes, not {start + segment.size}")
            segments.append(data[start : start + segment.size])
        references = [d.processed for plan in program.execution_plan for d in plan.delegates]
        constants = program.constant_segment
        offsets = constants.offsets
        constant_data = segments[constants.segment_index]
        return ProgramConstants(
            [bytes(segments[reference.index]) for reference in references],
            {entry.key: segments[entry.segment_index] for entry in program.named_data or ()},
            [constant_data[i:j] for i, j in pairwise([*offsets, len(constant_data)])],
        )
    except Exception as error:  # the library raises whatever its parsers raise
        raise InputError(
            "executorch can't read the program", where=path, got=first_line(error)
        ) from error
