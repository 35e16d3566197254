"""From steps to a .pte: its methods, and what they refer to, in one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from executorch.exir import schema
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry

from lfmc.targets.executorch.method import Method, fact
from lfmc.targets.executorch.steps import Given, Host, Inside, Step, Value, flat

CONSTANT_ALIGNMENT = 16


@dataclass(frozen=True)
class Assembled:
    """The bytes of a program and what it consists of."""

    data: bytes
    delegates: int
    outside: Mapping[str, int]  # operators that the runtime runs itself, and how often
    inside_work: float  # the share of a token's arithmetic that delegates do


def assemble(
    steps: Sequence[Step],
    given: Sequence[Given],
    results: Sequence[Value],
    facts: Mapping[str, Any],
) -> Assembled:
    """A program whose method `forward` runs `steps`; `facts` become methods of their own."""
    method = Method(steps, given, results)
    plans = [method.plan(), *(fact(name, value) for name, value in facts.items())]
    program = schema.Program(
        version=0,
        execution_plan=plans,
        constant_buffer=[schema.Buffer(data) for data in method.buffers],
        backend_delegate_data=[schema.BackendDelegateInlineData(data) for data in method.payloads],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(0, []),
    )
    named = NamedDataStoreOutput(
        buffers=list(method.constants.values()),
        pte_data={
            key: DataEntry(index, CONSTANT_ALIGNMENT, None)
            for index, key in enumerate(method.constants)
        },
        external_data={},
    )
    zeros = [schema.Buffer(bytes(nbytes)) for nbytes in method.zeros]
    file = PTEFile(program, mutable_data=zeros if len(zeros) > 1 else None, named_data=named)
    data = bytes(
        serialize_pte_binary(
            file, extract_delegate_segments=True, segment_alignment=CONSTANT_ALIGNMENT
        )
    )
    work: Counter[type] = Counter()
    for step in flat(steps):
        work[type(step)] += step.work
    return Assembled(
        data,
        len(method.payloads),
        Counter(step.name for step in flat(steps) if isinstance(step, Host)),
        work[Inside] / max(1, work.total()),
    )
