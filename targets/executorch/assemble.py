"""Assembly of a .pte file from steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from executorch.exir import schema
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry

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


@dataclass(frozen=True)
class AssembledProgram:
    """The bytes of a program and statistics about it."""

    data: bytes
    delegates: int
    runtime_operators: Mapping[str, int]  # counts of operators outside of delegates
    delegated_share: float  # the share of a token's arithmetic that delegates compute


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
        constant_buffer=[schema.Buffer(data) for data in method.buffers],
        backend_delegate_data=[schema.BackendDelegateInlineData(data) for data in method.payloads],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(0, []),
    )
    named_data = NamedDataStoreOutput(
        buffers=list(method.constants.values()),
        pte_data={
            key: DataEntry(index, CONSTANT_ALIGNMENT, None)
            for index, key in enumerate(method.constants)
        },
        external_data={},
    )
    zeros = [schema.Buffer(bytes(nbytes)) for nbytes in method.zero_buffers]
    file = PTEFile(program, mutable_data=zeros if len(zeros) > 1 else None, named_data=named_data)
    data = bytes(
        serialize_pte_binary(
            file, extract_delegate_segments=True, segment_alignment=CONSTANT_ALIGNMENT
        )
    )
    work: Counter[type] = Counter()
    for step in flatten_steps(steps):
        work[type(step)] += step.work
    return AssembledProgram(
        data,
        len(method.payloads),
        Counter(step.name for step in flatten_steps(steps) if isinstance(step, RuntimeStep)),
        work[XnnpackStep] / max(1, work.total()),
    )
