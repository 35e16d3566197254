"""Operators of XNNPACK on values, one function each: what is multiplied, and how it is told.

Each records a step; the values it makes stay inside of a delegate unless another step needs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_INVALID_VALUE_ID as NONE

from lfmc.targets.executorch.delegate import Delegate
from lfmc.targets.executorch.steps import (
    Constant,
    Inside,
    Length,
    Matrix,
    Shape,
    Size,
    Step,
    Value,
    constant,
    most,
)


@dataclass
class Recorder:
    """Notes down steps; those inside of XNNPACK by a method each, which gives what they make."""

    steps: list[Step] = field(default_factory=list)

    def _add(
        self,
        inputs: Sequence[Value],
        shape: Shape,
        node: Callable[[Delegate, int], Any],
        work: int | None = None,
    ) -> Value:
        made = Value(shape)

        def emit(delegate: Delegate) -> None:
            delegate.node(node(delegate, delegate.id(made)))

        used = tuple(x for x in inputs if not isinstance(x, Constant))
        counted = numel_at_one(shape) if work is None else work
        self.steps.append(Inside(used, (made,), emit, counted))
        return made

    def _one(self, kind: Any, x: Value) -> Value:
        return self._add([x], x.shape, lambda d, out: kind(d.id(x), out, 0))

    def _two(self, kind: Any, a: Value, b: Value) -> Value:
        shape = broadcast(a.shape, b.shape)
        return self._add([a, b], shape, lambda d, out: kind(d.id(a), d.id(b), out, 0))

    def add(self, a: Value, b: Value) -> Value:
        return self._two(xnn.XNNAdd, a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        return self._two(xnn.XNNSubtract, a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        return self._two(xnn.XNNMultiply, a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        return self._two(xnn.XNNMinimum, a, b)

    def sigmoid(self, x: Value) -> Value:
        return self._one(xnn.XNNSigmoid, x)

    def square(self, x: Value) -> Value:
        return self._one(xnn.XNNSquare, x)

    def rsqrt(self, x: Value) -> Value:
        return self._one(xnn.XNNReciprocalSquareRoot, x)

    def linear(self, x: Value, weight: Value | Matrix, bias: Value | None = None) -> Value:
        """`[..., K]` by `[N, K]`; where the weight is n-bit, every row of `x` is rounded to int8
        first, once for all such products of a delegate."""
        rows, columns = most(weight.shape)

        def node(d: Delegate, out: int) -> Any:
            left = d.rounded(x) if isinstance(weight, Matrix) else d.id(x)
            right = d.matrix(weight) if isinstance(weight, Matrix) else d.id(weight)
            return xnn.XNNFullyConnected(left, right, NONE if bias is None else d.id(bias), out, 0)

        shape = (*x.shape[:-1], rows)
        work = numel_at_one(shape) * columns
        return self._add([x], shape, node, work)

    def reshape(self, x: Value, shape: Shape) -> Value:
        """The same numbers in another shape; at most one of its sizes is a length."""
        sizes = [0 if isinstance(size, Length) else size for size in shape]
        return self._add(
            [x],
            shape,
            lambda d, out: xnn.XNNStaticReshape(len(sizes), sizes, d.id(x), out, 0),
            work=0,
        )

    def cut(self, x: Value, start: int, size: int) -> Value:
        """`size` numbers of the last dim."""
        offsets = [0] * (len(x.shape) - 1) + [start]
        sizes = [0 if isinstance(s, Length) else s for s in x.shape[:-1]] + [size]
        return self._add(
            [x],
            (*x.shape[:-1], size),
            lambda d, out: xnn.XNNStaticSlice(len(sizes), offsets, sizes, d.id(x), out, 0),
        )

    def join(self, a: Value, b: Value, dim: int, shape: Shape) -> Value:
        """Two tensors one behind the other."""
        return self._add(
            [a, b],
            shape,
            lambda d, out: xnn.XNNConcatenate2(dim, d.id(a), d.id(b), NONE, NONE, out, 0, NONE),
        )

    def filter(self, x: Value, taps: Constant, bias: Constant | None, length: Size) -> Value:
        """A filter for each channel along the dim before the last: `x` `[1, T + L - 1, H]`, `taps`
        `[L, H]`, to `[1, T, H]` with T `length`."""
        width, channels = taps.data.shape
        inner = constant(taps.data.view(1, 1, width, channels))
        wide = self.reshape(x, (1, 1, *x.shape[1:]))
        after = (1, 1, length, channels)

        def node(d: Delegate, out: int) -> Any:
            size = {"kernel_height": 1, "kernel_width": width, "groups": channels}
            ones = ("subsampling", "dilation")
            steps = {f"{name}_{side}": 1 for name in ones for side in ("height", "width")}
            sides = ("top", "right", "bottom", "left")
            none = {f"padding_{side}": 0 for side in sides}
            return xnn.XNNDepthwiseConv2d(
                **none,
                **size,
                **steps,
                group_input_channels=1,
                group_output_channels=1,
                adjustment_height=0,
                adjustment_width=0,
                input1_id=d.id(wide),
                filter_id=d.id(inner),
                bias_id=NONE if bias is None else d.id(bias),
                output_id=out,
                flags=0,
            )

        found = self._add([wide], after, node, work=width * channels)
        return self.reshape(found, (1, length, channels))

    def silu(self, x: Value) -> Value:
        return self.multiply(x, self.sigmoid(x))

    def norm(self, x: Value, weight: Value, eps: float) -> Value:
        """RMS norm along the last dim. XNNPACK's means are along other dims: here a product with
        1 / K gives it."""
        size = most(x.shape)[-1]
        mean = self.linear(self.square(x), constant(torch.full((1, size), 1 / size)), number(eps))
        return self.multiply(self.multiply(x, self.rsqrt(mean)), weight)


def number(value: float) -> Constant:
    """A constant of one number."""
    return constant(torch.tensor([value]))


def numel_at_one(shape: Shape) -> int:
    """How many numbers a tensor has at a call with one token."""
    return math.prod(1 if isinstance(size, Length) else size for size in shape)


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of a result of two tensors that are repeated where they have size 1."""
    rank = max(len(a), len(b))
    left, right = ((1,) * (rank - len(x)) + tuple(x) for x in (a, b))
    return tuple(y if x == 1 else x for x, y in zip(left, right, strict=True))
