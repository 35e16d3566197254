"""The intermediate form of a program: values, and the steps that compute them.

A step is an operator of XNNPACK (`XnnpackStep`, which becomes part of a delegate), an operator of
ExecuTorch's runtime (`RuntimeStep`), a sequence of steps in a fixed order (`Block`), or a sequence
that runs only if a condition holds (`Conditional`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Length:
    """A size that a call determines, at most `maximum`."""

    maximum: int


Size = int | Length
Shape = tuple[Size, ...]


def max_sizes(shape: Shape) -> list[int]:
    """Return the largest sizes of a shape."""
    return [size.maximum if isinstance(size, Length) else size for size in shape]


@dataclass(eq=False)
class Value:
    """A tensor that a step computes."""

    shape: Shape
    dtype: torch.dtype = torch.float32


@dataclass(eq=False)
class Input(Value):
    """A tensor that the caller passes."""


@dataclass(eq=False)
class State(Value):
    """A tensor that persists between calls: `zeros` at first, or written before it is read."""

    zeros: bool = False


@dataclass(eq=False)
class Constant(Value):
    """A tensor stored in the file."""

    data: Tensor = field(kw_only=True)


@dataclass(eq=False)
class Element(Value):
    """One element of the tensor `base`, in that tensor's memory."""

    base: Value = field(kw_only=True)
    index: int = field(kw_only=True)


@dataclass(eq=False)
class Matrix:
    """An n-bit weight `[N, K]` in XNNPACK's storage.

    4-bit codes are a bit stream per row, uint8 `[N, K / 2]`, with one bfloat16 scale per `group`
    columns. 8-bit codes are int8 `[N, K]` with one float32 scale per row.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Tensor
    scales: Tensor


@dataclass(eq=False)
class Integer:
    """An integer that a step computes."""


def byte_view(data: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if it is contiguous."""
    return data.contiguous().flatten().view(torch.uint8).numpy().data


def constant(data: Tensor) -> Constant:
    return Constant(tuple(data.shape), data.dtype, data=data.contiguous())


@dataclass(eq=False)
class XnnpackStep:
    """One or more XNNPACK operators that compute one value; `emit` adds them to a delegate.

    `work` counts multiplications and similar operations for one token.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value]
    emit: Callable[[Any], None]
    work: int


@dataclass(eq=False)
class RuntimeStep:
    """An operator of the runtime; `name` is `namespace::operator.overload`.

    `arguments` follow the operator's schema, outputs included. `returns` is what the schema
    returns. `outputs` are the values that the step computes and the states that it changes. The
    step runs after the steps that compute `dependencies`.
    """

    name: str
    arguments: tuple[Any, ...]
    returns: tuple[Any, ...]
    outputs: tuple[Value | Integer, ...]
    dependencies: tuple[Value | Integer, ...] = ()
    work: int = 0

    @property
    def inputs(self) -> tuple[Any, ...]:
        output_ids = {id(x) for x in self.outputs}
        flat = [
            x for arg in self.arguments for x in (arg if isinstance(arg, (list, tuple)) else [arg])
        ]
        used = (x for x in (*flat, *self.dependencies) if isinstance(x, (Value, Integer)))
        return tuple(x for x in used if id(x) not in output_ids)


@dataclass(eq=False)
class Block:
    """Steps in this order; `outputs` are available after the last step."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    steps: Sequence[Step]


@dataclass(eq=False)
class Conditional:
    """Steps in this order, which run only if the bool `condition` is true."""

    condition: Value
    steps: Sequence[Step]
    outputs: tuple[Value, ...] = ()

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.condition,)


Step = XnnpackStep | RuntimeStep | Block | Conditional


def flatten_steps(steps: Sequence[Step]) -> Iterator[XnnpackStep | RuntimeStep]:
    """Yield every operator, including those of nested steps."""
    for step in steps:
        if isinstance(step, (Block, Conditional)):
            yield from flatten_steps(step.steps)
        else:
            yield step


def order_steps(steps: Sequence[Step], inputs: Sequence[Value]) -> list[Step]:
    """Order the steps so that few delegates are needed.

    The order alternates between all steps outside of XNNPACK that are ready, and all XNNPACK steps
    that are ready after them.
    """
    computed: set[int] = {id(value) for value in inputs}

    def is_ready(step: Step) -> bool:
        return all(isinstance(x, (Constant, State)) or id(x) in computed for x in step.inputs)

    def take_ready(of_xnnpack: bool) -> Iterator[Step]:
        for step in list(pending):
            if isinstance(step, XnnpackStep) == of_xnnpack and is_ready(step):
                pending.remove(step)
                computed.update(map(id, step.outputs))
                yield step

    pending, ordered = list(steps), list[Step]()
    while pending:
        count = len(pending)
        for of_xnnpack in (False, True):
            ordered += take_ready(of_xnnpack)
        if len(pending) == count:
            raise AssertionError("steps wait for each other")
    return ordered
