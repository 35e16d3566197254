"""What a program does at a call, before it is a file: values, and the steps that make them.

A step is an operator of XNNPACK (`Inside`, to become part of a delegate), an operator of the
runtime (`Host`), or several of these: in a fixed order (`Block`), or only where a condition holds
(`Only`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Length:
    """A size that is known when a call comes."""

    most: int


Size = int | Length
Shape = tuple[Size, ...]


def most(shape: Shape) -> list[int]:
    """The largest a shape can be."""
    return [size.most if isinstance(size, Length) else size for size in shape]


@dataclass(eq=False)
class Value:
    """A tensor that a step makes."""

    shape: Shape
    dtype: torch.dtype = torch.float32


@dataclass(eq=False)
class Given(Value):
    """A tensor that a call brings."""


@dataclass(eq=False)
class State(Value):
    """A tensor that is kept from call to call: `zeros` at first, or written before it is read."""

    zeros: bool = False


@dataclass(eq=False)
class Constant(Value):
    """A tensor of the file."""

    data: Tensor = field(kw_only=True)


@dataclass(eq=False)
class Element(Value):
    """One number of a tensor, in that tensor's memory."""

    of: Value = field(kw_only=True)
    index: int = field(kw_only=True)


@dataclass(eq=False)
class Matrix:
    """An n-bit weight `[N, K]` as XNNPACK reads it.

    Codes are a bit stream of 4 bits a row, uint8 `[N, K / 2]`, with bfloat16 scales for every
    `group` columns; or int8 `[N, K]` with a float32 scale a row.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Tensor
    scales: Tensor


@dataclass(eq=False)
class Number:
    """An integer that a step makes."""


def as_bytes(data: Tensor) -> bytes:
    return data.contiguous().view(torch.uint8).numpy().tobytes()


def constant(data: Tensor) -> Constant:
    return Constant(tuple(data.shape), data.dtype, data=data.contiguous())


@dataclass(eq=False)
class Inside:
    """Operators of XNNPACK that make one value; `emit` adds them to the delegate they end up in.

    `work` counts multiplications and the like for one token.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value]
    emit: Callable[[Any], None]
    work: int


@dataclass(eq=False)
class Host:
    """An operator of the runtime: `name` is `namespace::operator.overload`.

    `arguments` are in the order of its schema, outputs among them. `returned` is what the schema
    returns; `outputs` what the step makes, states that it changes too; it comes after `needs`.
    """

    name: str
    arguments: tuple[Any, ...]
    returned: tuple[Any, ...]
    outputs: tuple[Value | Number, ...]
    needs: tuple[Value | Number, ...] = ()
    work: int = 0

    @property
    def inputs(self) -> tuple[Any, ...]:
        made = {id(x) for x in self.outputs}
        flat = [
            x for arg in self.arguments for x in (arg if isinstance(arg, (list, tuple)) else [arg])
        ]
        used = (x for x in (*flat, *self.needs) if isinstance(x, (Value, Number)))
        return tuple(x for x in used if id(x) not in made)


@dataclass(eq=False)
class Block:
    """Steps in this order; `outputs` are there when all are done."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    steps: Sequence[Step]


@dataclass(eq=False)
class Only:
    """Steps in this order, where the bool `condition` holds."""

    condition: Value
    steps: Sequence[Step]
    outputs: tuple[Value, ...] = ()

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.condition,)


Step = Inside | Host | Block | Only


def flat(steps: Sequence[Step]) -> Iterator[Inside | Host]:
    """Every operator, those of steps within steps too."""
    for step in steps:
        if isinstance(step, (Block, Only)):
            yield from flat(step.steps)
        else:
            yield step


def arrange(steps: Sequence[Step], given: Sequence[Value]) -> list[Step]:
    """The steps in an order that needs few delegates: what is not XNNPACK's as early as it can be,
    then all of XNNPACK's that can follow."""
    done: set[int] = {id(value) for value in given}

    def ready(step: Step) -> bool:
        return all(isinstance(x, (Constant, State)) or id(x) in done for x in step.inputs)

    def take(inside: bool) -> Iterator[Step]:
        for step in list(waiting):
            if isinstance(step, Inside) == inside and ready(step):
                waiting.remove(step)
                done.update(map(id, step.outputs))
                yield step

    waiting, found = list(steps), list[Step]()
    while waiting:
        before = len(waiting)
        for inside in (False, True):
            found += take(inside)
        if len(waiting) == before:
            raise AssertionError("steps wait for each other")
    return found
