"""Methods of a .pte: delegates, instructions, and where every value lies in memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType

from lfmc.targets.executorch.delegate import Delegate
from lfmc.targets.executorch.steps import (
    Block,
    Constant,
    Element,
    Given,
    Host,
    Inside,
    Length,
    Number,
    Only,
    State,
    Step,
    Value,
    as_bytes,
    most,
)

SCALARS = {
    torch.float32: ScalarType.FLOAT,
    torch.float16: ScalarType.HALF,
    torch.int64: ScalarType.LONG,
    torch.uint8: ScalarType.BYTE,
    torch.int8: ScalarType.CHAR,
    torch.bool: ScalarType.BOOL,
}
BACKEND = "XnnpackBackend"
ALIGNMENT = 64
ONE = '{"type": null, "context": null, "children_spec": []}'


class Method:
    """Values by number, instructions, and what they refer to."""

    def __init__(
        self, steps: Sequence[Step], given: Sequence[Given], results: Sequence[Value]
    ) -> None:
        self.payloads: list[bytes] = []
        self.constants: dict[str, bytes] = {}
        self.buffers = [b""]
        self.zeros = [0]  # bytes of states' first values, each size once
        self._given, self._results = given, results
        self._values: list[Any] = []  # an EValue, or a tensor that is not placed yet
        self._numbers: dict[Any, int] = {}
        self._operators: dict[tuple[str, str], int] = {}
        self._instructions: list[schema.Instruction] = []
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._users = _users(steps)
        for value in given:
            self._tensor(value)
        self._emit(steps)
        for result in results:
            self._tensor(result)

    def plan(self) -> schema.ExecutionPlan:
        inputs, outputs = (
            [self._numbers[id(x)] for x in values] for values in (self._given, self._results)
        )
        offsets, nbytes = self._memory()
        return schema.ExecutionPlan(
            name="forward",
            container_meta_type=schema.ContainerMetadata(
                _tuple(len(inputs)), _returned(len(outputs))
            ),
            values=[
                schema.EValue(self._placed(value, offsets) if isinstance(value, Value) else value)
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
        """Instructions of the steps in this order; neighbours inside of XNNPACK become one."""
        group: list[Inside] = []
        for step in steps:
            if isinstance(step, Inside):
                group.append(step)
                continue
            self._delegate(group)
            group = []
            if isinstance(step, Host):
                self._call(step)
            elif isinstance(step, Block):
                self._emit(step.steps)
            else:
                jump = schema.JumpFalseCall(self._argument(step.condition), 0)
                self._instructions.append(schema.Instruction(jump))
                self._emit(step.steps)
                jump.destination_instruction = len(self._instructions)
        self._delegate(group)

    def _delegate(self, group: Sequence[Inside]) -> None:
        if not group:
            return
        own = set(map(id, group))
        made = [step.outputs[0] for step in group]
        outputs = [x for x in made if x in self._results or self._users[id(x)] - own]
        delegate = Delegate(group, outputs)
        arguments = [self._argument(value) for value in (*delegate.inputs, *delegate.outputs)]
        call = schema.DelegateCall(len(self.payloads), arguments)
        self._instructions.append(schema.Instruction(call))
        self.payloads.append(delegate.payload())
        self.constants |= delegate.constants

    def _call(self, step: Host) -> None:
        name, _, overload = step.name.partition(".")
        key = (name, overload)
        operator = self._operators.setdefault(key, len(self._operators))
        arguments = [self._argument(x) for x in (*step.arguments, *step.returned)]
        self._instructions.append(schema.Instruction(schema.KernelCall(operator, arguments)))

    def _argument(self, x: Any) -> int:
        """The number of a value as the next instruction uses it."""
        if isinstance(x, Value):
            return self._tensor(x)
        if isinstance(x, Number):
            return self._number(id(x), schema.Int(0))
        if isinstance(x, list):
            inner = [self._argument(item) for item in x]
            kind = schema.IntList if isinstance(x[0], int) else schema.TensorList
            return self._number((kind, tuple(inner)), kind(inner))
        if isinstance(x, tuple):  # a list of tensors that may be left out
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
        base = value.of if isinstance(value, Element) else value
        now = len(self._instructions)
        self._first.setdefault(id(base), now)
        self._last[id(base)] = now
        if base is not value:
            self._tensor(base)
        return self._number(id(value), value)

    def _memory(self) -> tuple[dict[int, int], int]:
        """The place of every tensor that a step makes, in one block, and its bytes: the largest
        first, each as low as those allow that are alive at the same time."""
        end = len(self._instructions)
        spans = []
        for value in self._values:
            if not isinstance(value, Value) or isinstance(value, (Constant, Element)):
                continue
            first, last = self._first[id(value)], self._last[id(value)]
            if isinstance(value, State):
                first, last = 0, end
            if isinstance(value, Given):
                first = 0
            if value in self._results:
                last = end
            spans.append((_nbytes(value), first, last, value))
        placed: list[tuple[int, int, int, int]] = []
        offsets: dict[int, int] = {}
        for nbytes, first, last, value in sorted(spans, key=lambda span: -span[0]):
            rival = sorted(p for p in placed if p[2] <= last and first <= p[3])
            start = 0
            for begin, finish, *_ in rival:
                if start + nbytes <= begin:
                    break
                start = max(start, finish)
            start = -(-start // ALIGNMENT) * ALIGNMENT
            offsets[id(value)] = start
            placed.append((start, -(-(start + nbytes) // ALIGNMENT) * ALIGNMENT, first, last))
        return offsets, max((finish for _, finish, *_ in placed), default=0)

    def _placed(self, value: Value, offsets: Mapping[int, int]) -> schema.Tensor:
        """A tensor as a .pte has it."""
        held, place = 0, None
        if isinstance(value, Constant):
            held = self._buffer(value)
        else:
            base = value.of if isinstance(value, Element) else value
            offset = offsets[id(base)]
            if isinstance(value, Element):
                offset += value.index * value.dtype.itemsize
            if isinstance(value, State) and value.zeros:
                held = self._zeros(_nbytes(value))
            place = schema.AllocationDetails(1, offset & 0xFFFFFFFF, offset >> 32)
        sizes = most(value.shape)
        moving = any(isinstance(size, Length) for size in value.shape)
        shapes = schema.TensorShapeDynamism
        return schema.Tensor(
            scalar_type=SCALARS[value.dtype],
            storage_offset=0,
            sizes=sizes,
            dim_order=list(range(len(sizes))),
            requires_grad=False,
            layout=0,
            data_buffer_idx=held,
            allocation_info=place,
            shape_dynamism=shapes.DYNAMIC_BOUND if moving else shapes.STATIC,
        )

    def _zeros(self, nbytes: int) -> int:
        if nbytes not in self.zeros:
            self.zeros.append(nbytes)
        return self.zeros.index(nbytes)

    def _buffer(self, value: Constant) -> int:
        self.buffers.append(as_bytes(value.data))
        return len(self.buffers) - 1


def _users(steps: Sequence[Step]) -> defaultdict[int, set[int]]:
    """Who reads each value, by identity: operators, and conditions."""
    found: defaultdict[int, set[int]] = defaultdict(set)
    for step in steps:
        if isinstance(step, (Block, Only)):
            for key, users in _users(step.steps).items():
                found[key] |= users
        for value in step.inputs:
            base = value.of if isinstance(value, Element) else value
            found[id(base)].add(id(step))
    return found


def _nbytes(value: Value) -> int:
    return math.prod(most(value.shape)) * value.dtype.itemsize


def _scalar(x: Any) -> Any:
    if x is None:
        return schema.Null()
    if isinstance(x, bool):
        return schema.Bool(x)
    return schema.Int(x) if isinstance(x, int) else schema.Double(float(x))


def fact(name: str, value: Any) -> schema.ExecutionPlan:
    """A method without arguments that returns a constant, or several."""
    items = value if isinstance(value, list) else [value]
    form = _returned(1)
    if isinstance(value, list):
        inner = ", ".join([ONE] * len(items))
        form = f'[1, {{"type": "builtins.list", "context": "null", "children_spec": [{inner}]}}]'
    return schema.ExecutionPlan(
        name=name,
        container_meta_type=schema.ContainerMetadata("", form),
        values=[schema.EValue(_scalar(item)) for item in items],
        inputs=[],
        outputs=list(range(len(items))),
        chains=[schema.Chain([], [], [], None)],
        operators=[],
        delegates=[],
        non_const_buffer_sizes=[0],
    )


def _tuple(count: int) -> str:
    """How a call's arguments are nested, in the notation of torch's pytrees."""
    inner = ", ".join([ONE] * count)
    arguments = f'{{"type": "builtins.tuple", "context": "null", "children_spec": [{inner}]}}'
    keywords = '{"type": "builtins.dict", "context": "[]", "children_spec": []}'
    both = f"{arguments}, {keywords}"
    return f'[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [{both}]}}]'


def _returned(count: int) -> str:
    return "[1, " + ", ".join([ONE] * count) + "]"
