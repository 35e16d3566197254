"""Serialization of a .pte method: values, instructions, delegates and the memory plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType

from lfmc.targets.executorch.delegate import Bytes, Delegate
from lfmc.targets.executorch.steps import (
    Block,
    Conditional,
    Constant,
    Element,
    Input,
    Integer,
    Length,
    RuntimeStep,
    State,
    Step,
    Value,
    XnnpackStep,
    byte_view,
    max_sizes,
)

SCALARS = {
    torch.float32: ScalarType.FLOAT,
    torch.bfloat16: ScalarType.BFLOAT16,
    torch.int64: ScalarType.LONG,
    torch.uint8: ScalarType.BYTE,
    torch.int8: ScalarType.CHAR,
    torch.bool: ScalarType.BOOL,
}
BACKEND = "XnnpackBackend"
ALIGNMENT = 64
LEAF_SPEC = '{"type": null, "context": null, "children_spec": []}'


class Method:
    """A method under construction: numbered values, instructions, and the data they refer to."""

    def __init__(
        self, steps: Sequence[Step], inputs: Sequence[Input], results: Sequence[Value]
    ) -> None:
        self.payloads: list[bytes] = []
        self.constants: dict[str, Bytes] = {}
        self.buffers: list[Bytes] = [b""]
        self.zero_buffers = [0]  # sizes in bytes of the states' initial zeros, without duplicates
        self._inputs, self._results = inputs, results
        self._values: list[Any] = []  # an EValue, or a tensor without a place in memory yet
        self._numbers: dict[Any, int] = {}
        self._operators: dict[tuple[str, str], int] = {}
        self._instructions: list[schema.Instruction] = []
        self._first_use: dict[int, int] = {}
        self._last_use: dict[int, int] = {}
        self._readers = _find_readers(steps)
        for value in inputs:
            self._tensor(value)
        self._emit(steps)
        for result in results:
            self._tensor(result)

    def plan(self) -> schema.ExecutionPlan:
        inputs, outputs = (
            [self._numbers[id(x)] for x in values] for values in (self._inputs, self._results)
        )
        offsets, nbytes = self._memory()
        return schema.ExecutionPlan(
            name="forward",
            container_meta_type=schema.ContainerMetadata(
                _arguments_spec(len(inputs)), _results_spec(len(outputs))
            ),
            values=[
                schema.EValue(
                    self._serialize_tensor(value, offsets) if isinstance(value, Value) else value
                )
                for value in self._values
            ],
            inputs=inputs,
            outputs=outputs,
            chains=[schema.Chain([], [], self._instructions, None)],
            operators=[schema.Operator(*key) for key in self._operators],
            delegates=[
                schema.BackendDelegate(
                    BACKEND,
                    schema.BackendDelegateDataReference(schema.DataLocation.INLINE, index),
                    [],
                )
                for index in range(len(self.payloads))
            ],
            non_const_buffer_sizes=[0, nbytes],
        )

    def _emit(self, steps: Sequence[Step]) -> None:
        """Append instructions for the steps; adjacent XNNPACK steps become one delegate call."""
        group: list[XnnpackStep] = []
        for step in steps:
            if isinstance(step, XnnpackStep):
                group.append(step)
                continue
            self._delegate(group)
            group = []
            if isinstance(step, RuntimeStep):
                self._call(step)
            elif isinstance(step, Block):
                self._emit(step.steps)
            else:
                jump = schema.JumpFalseCall(self._argument(step.condition), 0)
                self._instructions.append(schema.Instruction(jump))
                self._emit(step.steps)
                jump.destination_instruction = len(self._instructions)
        self._delegate(group)

    def _delegate(self, group: Sequence[XnnpackStep]) -> None:
        if not group:
            return
        group_ids = set(map(id, group))
        computed = [step.outputs[0] for step in group]
        outputs = [x for x in computed if x in self._results or self._readers[id(x)] - group_ids]
        delegate = Delegate(group, outputs)
        arguments = [self._argument(value) for value in (*delegate.inputs, *delegate.outputs)]
        call = schema.DelegateCall(len(self.payloads), arguments)
        self._instructions.append(schema.Instruction(call))
        self.payloads.append(delegate.payload())
        self.constants |= delegate.constants

    def _call(self, step: RuntimeStep) -> None:
        name, _, overload = step.name.partition(".")
        key = (name, overload)
        operator = self._operators.setdefault(key, len(self._operators))
        arguments = [self._argument(x) for x in (*step.arguments, *step.returns)]
        self._instructions.append(schema.Instruction(schema.KernelCall(operator, arguments)))

    def _argument(self, x: Any) -> int:
        """Return the number of a value that the next instruction uses."""
        if isinstance(x, Value):
            return self._tensor(x)
        if isinstance(x, Integer):
            return self._number(id(x), schema.Int(0))
        if isinstance(x, list):
            inner = [self._argument(item) for item in x]
            kind = schema.IntList if isinstance(x[0], int) else schema.TensorList
            return self._number((kind, tuple(inner)), kind(inner))
        if isinstance(x, tuple):  # a list of optional tensors
            inner = [self._argument(item) for item in x]
            kind = schema.OptionalTensorList
            return self._number((kind, tuple(inner)), kind(inner))
        return self._number((type(x), x), _scalar(x))

    def _number(self, key: Any, value: Any) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self._values)
            self._values.append(value)
        return self._numbers[key]

    def _tensor(self, value: Value) -> int:
        base = value.base if isinstance(value, Element) else value
        instruction = len(self._instructions)
        self._first_use.setdefault(id(base), instruction)
        self._last_use[id(base)] = instruction
        if base is not value:
            self._tensor(base)
        return self._number(id(value), value)

    def _memory(self) -> tuple[dict[int, int], int]:
        """Plan one memory block; return the offset of every variable tensor, and the block's bytes.

        Tensors are placed from the largest to the smallest, each at the lowest offset that does not
        overlap a tensor which is alive at the same time.
        """
        end = len(self._instructions)
        spans = []
        for value in self._values:
            if not isinstance(value, Value) or isinstance(value, (Constant, Element)):
                continue
            first, last = self._first_use[id(value)], self._last_use[id(value)]
            if isinstance(value, State):
                first, last = 0, end
            if isinstance(value, Input):
                first = 0
            if value in self._results:
                last = end
            spans.append((_nbytes(value), first, last, value))
        placed: list[tuple[int, int, int, int]] = []  # begin, end, first use, last use
        offsets: dict[int, int] = {}
        for nbytes, first, last, value in sorted(spans, key=lambda span: -span[0]):
            overlapping = sorted(p for p in placed if p[2] <= last and first <= p[3])
            start = 0
            for begin, finish, *_ in overlapping:
                if start + nbytes <= begin:
                    break
                start = max(start, finish)
            start = -(-start // ALIGNMENT) * ALIGNMENT
            offsets[id(value)] = start
            placed.append((start, -(-(start + nbytes) // ALIGNMENT) * ALIGNMENT, first, last))
        return offsets, max((finish for _, finish, *_ in placed), default=0)

    def _serialize_tensor(self, value: Value, offsets: Mapping[int, int]) -> schema.Tensor:
        """Return the schema of a tensor."""
        buffer_index, place = 0, None
        if isinstance(value, Constant):
            buffer_index = self._add_buffer(value)
        else:
            base = value.base if isinstance(value, Element) else value
            offset = offsets[id(base)]
            if isinstance(value, Element):
                offset += value.index * value.dtype.itemsize
            if isinstance(value, State) and value.zeros:
                buffer_index = self._zero_buffer(_nbytes(value))
            place = schema.AllocationDetails(1, offset & 0xFFFFFFFF, offset >> 32)
        sizes = max_sizes(value.shape)
        dynamic = any(isinstance(size, Length) for size in value.shape)
        shapes = schema.TensorShapeDynamism
        return schema.Tensor(
            scalar_type=SCALARS[value.dtype],
            storage_offset=0,
            sizes=sizes,
            dim_order=list(range(len(sizes))),
            requires_grad=False,
            layout=0,
            data_buffer_idx=buffer_index,
            allocation_info=place,
            shape_dynamism=shapes.DYNAMIC_BOUND if dynamic else shapes.STATIC,
        )

    def _zero_buffer(self, nbytes: int) -> int:
        if nbytes not in self.zero_buffers:
            self.zero_buffers.append(nbytes)
        return self.zero_buffers.index(nbytes)

    def _add_buffer(self, value: Constant) -> int:
        self.buffers.append(byte_view(value.data))
        return len(self.buffers) - 1


def _find_readers(steps: Sequence[Step]) -> defaultdict[int, set[int]]:
    """Return the ids of the steps that read each value, by the id of the value."""
    readers: defaultdict[int, set[int]] = defaultdict(set)
    for step in steps:
        if isinstance(step, (Block, Conditional)):
            for key, step_ids in _find_readers(step.steps).items():
                readers[key] |= step_ids
        for value in step.inputs:
            base = value.base if isinstance(value, Element) else value
            readers[id(base)].add(id(step))
    return readers


def _nbytes(value: Value) -> int:
    return math.prod(max_sizes(value.shape)) * value.dtype.itemsize


def _scalar(x: Any) -> Any:
    if x is None:
        return schema.Null()
    if isinstance(x, bool):
        return schema.Bool(x)
    return schema.Int(x) if isinstance(x, int) else schema.Double(float(x))


def constant_method(name: str, value: Any) -> schema.ExecutionPlan:
    """Return a method without arguments that returns a constant or a list of constants."""
    items = value if isinstance(value, list) else [value]
    spec = _results_spec(1)
    if isinstance(value, list):
        inner = ", ".join([LEAF_SPEC] * len(items))
        spec = f'[1, {{"type": "builtins.list", "context": "null", "children_spec": [{inner}]}}]'
    return schema.ExecutionPlan(
        name=name,
        container_meta_type=schema.ContainerMetadata("", spec),
        values=[schema.EValue(_scalar(item)) for item in items],
        inputs=[],
        outputs=list(range(len(items))),
        chains=[schema.Chain([], [], [], None)],
        operators=[],
        delegates=[],
        non_const_buffer_sizes=[0],
    )


def _arguments_spec(count: int) -> str:
    """Return the nesting of a call's arguments in the notation of torch's pytrees."""
    inner = ", ".join([LEAF_SPEC] * count)
    arguments = f'{{"type": "builtins.tuple", "context": "null", "children_spec": [{inner}]}}'
    keywords = '{"type": "builtins.dict", "context": "[]", "children_spec": []}'
    children = f"{arguments}, {keywords}"
    return f'[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [{children}]}}]'


def _results_spec(count: int) -> str:
    return "[1, " + ", ".join([LEAF_SPEC] * count) + "]"
