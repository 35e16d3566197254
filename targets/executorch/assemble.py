"""Assembly of a .pte file from steps."""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.exir import schema
from executorch.exir._serialize._cord import Cord, FileBackedData
from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program

from lfmc.targets.executorch.delegate import Bytes, constant_key
from lfmc.targets.executorch.method import Method, constant_method
from lfmc.targets.executorch.steps import (
    Input,
    RuntimeStep,
    Step,
    Value,
    XnnpackStep,
    flatten_steps,
)

CONSTANT_ALIGNMENT = 16
# A segment of one byte, until it refers to a constant: flatbuffers don't store a size of 0.
PLACEHOLDER = b"\0"
SEGMENT_SLOTS = (4, 6)  # of the fields `offset` and `size` in a flatbuffer table `DataSegment`


class _Constant(FileBackedData):  # type: ignore[misc]
    """The bytes of a constant, which `Cord` writes to a file one by one, without a copy."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __deepcopy__(self, memo: Any) -> _Constant:
        return self  # the library copies the program, whose constants do not change

    def __len__(self) -> int:
        return len(self._data)

    def to_bytes(self) -> bytes:
        return bytes(self._data)

    def write_to_file(self, outfile: Any) -> None:
        outfile.write(self._data)


@dataclass(frozen=True)
class AssembledProgram:
    """A program that is ready to be written, and statistics about it.

    `shared` are the keys of delegates' constants that operators of the runtime read, too, and for
    each its index and its size in the segment of all constants.
    """

    content: Cord
    shared: Mapping[str, tuple[int, int]]
    delegates: int
    runtime_operators: Mapping[str, int]  # counts of operators outside of delegates
    delegated_share: float  # the share of a token's arithmetic that delegates compute

    def write(self, path: Path) -> None:
        """Write the program; each constant goes from where it is to the file."""
        with path.open("w+b") as file:
            self.content.write_to_file(file)
            file.flush()
            with mmap.mmap(file.fileno(), 0) as data:
                _share(data, self.shared)

    def to_bytes(self) -> bytes:
        """Return the program in memory."""
        data = bytearray(bytes(self.content))
        _share(data, self.shared)
        return bytes(data)


def assemble(
    steps: Sequence[Step],
    inputs: Sequence[Input],
    results: Sequence[Value],
    facts: Mapping[str, Any],
) -> AssembledProgram:
    """Return a program whose method `forward` runs `steps`; each fact becomes a method."""
    method = Method(steps, inputs, results)
    plans = [method.plan(), *(constant_method(name, value) for name, value in facts.items())]
    program = schema.Program(
        version=0,
        execution_plan=plans,
        constant_buffer=[schema.Buffer(_wrap(data)) for data in method.buffers],
        backend_delegate_data=[schema.BackendDelegateInlineData(data) for data in method.payloads],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(0, []),
    )
    shared = _find_shared(method)
    named_data = NamedDataStoreOutput(
        buffers=[PLACEHOLDER if key in shared else _wrap(x) for key, x in method.constants.items()],
        pte_data={
            key: DataEntry(index, CONSTANT_ALIGNMENT, None)
            for index, key in enumerate(method.constants)
        },
        external_data={},
    )
    zeros = [schema.Buffer(bytes(nbytes)) for nbytes in method.zero_buffers]
    pte = PTEFile(program, mutable_data=zeros if len(zeros) > 1 else None, named_data=named_data)
    content = serialize_pte_binary(
        pte, extract_delegate_segments=True, segment_alignment=CONSTANT_ALIGNMENT
    )
    work: Counter[type] = Counter()
    for step in flatten_steps(steps):
        work[type(step)] += step.work
    return AssembledProgram(
        content,
        shared,
        len(method.payloads),
        Counter(step.name for step in flatten_steps(steps) if isinstance(step, RuntimeStep)),
        work[XnnpackStep] / max(1, work.total()),
    )


def _wrap(data: Bytes) -> Any:
    return data if isinstance(data, bytes) else _Constant(data)


def _find_shared(method: Method) -> dict[str, tuple[int, int]]:
    """Return the keys of delegates' constants that operators of the runtime read, too.

    A value of the result is the constant's index in `method.buffers`, and its bytes.
    """
    indices = {constant_key(data): (index, len(data)) for index, data in enumerate(method.buffers)}
    return {key: indices[key] for key in method.constants if key in indices}


def _share(data: bytearray | mmap.mmap, shared: Mapping[str, tuple[int, int]]) -> None:
    """Let the segment of each shared constant refer to bytes of the segment of all constants.

    The runtime loads a segment by its offset and its size, so segments may overlap.
    """
    _patch_generated_flatbuffer_aliases()  # without it, `Program` finds modules for its classes
    program = Program.GetRootAs(data)
    offsets = program.ConstantSegment()
    start = program.Segments(offsets.SegmentIndex()).Offset()
    for number in range(program.NamedDataLength()):
        entry = program.NamedData(number)
        constant = shared.get(entry.Key().decode())
        if constant is None:
            continue
        index, nbytes = constant
        table = program.Segments(entry.SegmentIndex())._tab
        fields = start + offsets.Offsets(index), nbytes
        for slot, value in zip(SEGMENT_SLOTS, fields, strict=True):
            struct.pack_into("<Q", data, table.Pos + table.Offset(slot), value)
