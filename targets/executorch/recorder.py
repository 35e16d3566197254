"""A recorder of steps, with one method per XNNPACK operator.

A recorded value stays inside of its delegate unless a step outside of the delegate reads it.
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
    Length,
    Matrix,
    Shape,
    Size,
    Step,
    Value,
    XnnpackStep,
    constant,
    max_sizes,
)


@dataclass
class Recorder:
    """Records steps; each method records one XNNPACK operator and returns its result."""

    steps: list[Step] = field(default_factory=list)

    def _add(
        self,
        inputs: Sequence[Value],
        shape: Shape,
        node: Callable[[Delegate, int], Any],
        work: int | None = None,
    ) -> Value:
        """Record an operator; `node` returns its node for a delegate and an output id."""
        result = Value(shape)

        def emit(delegate: Delegate) -> None:
            delegate.add_node(node(delegate, delegate.float_id(result)))

        variables = tuple(x for x in inputs if not isinstance(x, Constant))
        work = numel_per_token(shape) if work is None else work
        self.steps.append(XnnpackStep(variables, (result,), emit, work))
        return result

    def _unary(self, kind: Any, x: Value) -> Value:
        return self._add([x], x.shape, lambda d, out: kind(d.float_id(x), out, 0))

    def _binary(self, kind: Any, a: Value, b: Value) -> Value:
        shape = broadcast(a.shape, b.shape)
        return self._add([a, b], shape, lambda d, out: kind(d.float_id(a), d.float_id(b), out, 0))

    def add(self, a: Value, b: Value) -> Value:
        return self._binary(xnn.XNNAdd, a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        return self._binary(xnn.XNNSubtract, a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        return self._binary(xnn.XNNMultiply, a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        return self._binary(xnn.XNNMinimum, a, b)

    def sigmoid(self, x: Value) -> Value:
        return self._unary(xnn.XNNSigmoid, x)

    def square(self, x: Value) -> Value:
        return self._unary(xnn.XNNSquare, x)

    def rsqrt(self, x: Value) -> Value:
        return self._unary(xnn.XNNReciprocalSquareRoot, x)

    def linear(self, x: Value, weight: Value | Matrix, bias: Value | None = None) -> Value:
        """Multiply `x` `[..., K]` by a weight `[N, K]`.

        If the weight is n-bit, every row of `x` is rounded to int8 first, once for all n-bit
        products of a delegate.
        """
        rows, columns = max_sizes(weight.shape)

        def node(d: Delegate, out: int) -> Any:
            left = d.rounded_id(x) if isinstance(weight, Matrix) else d.float_id(x)
            right = d.matrix_id(weight) if isinstance(weight, Matrix) else d.float_id(weight)
            bias_id = NONE if bias is None else d.float_id(bias)
            return xnn.XNNFullyConnected(left, right, bias_id, out, 0)

        shape = (*x.shape[:-1], rows)
        work = numel_per_token(shape) * columns
        return self._add([x], shape, node, work)

    def reshape(self, x: Value, shape: Shape) -> Value:
        """Reshape `x`; at most one size of the new shape is a `Length`."""
        sizes = [0 if isinstance(size, Length) else size for size in shape]
        return self._add(
            [x],
            shape,
            lambda d, out: xnn.XNNStaticReshape(len(sizes), sizes, d.float_id(x), out, 0),
            work=0,
        )

    def slice_last(self, x: Value, start: int, size: int) -> Value:
        """Slice `size` elements of the last dim, from `start` on."""
        offsets = [0] * (len(x.shape) - 1) + [start]
        sizes = [0 if isinstance(s, Length) else s for s in x.shape[:-1]] + [size]
        return self._add(
            [x],
            (*x.shape[:-1], size),
            lambda d, out: xnn.XNNStaticSlice(len(sizes), offsets, sizes, d.float_id(x), out, 0),
        )

    def concatenate(self, a: Value, b: Value, dim: int, shape: Shape) -> Value:
        """Concatenate two tensors along `dim`; `shape` is the result's."""
        return self._add(
            [a, b],
            shape,
            lambda d, out: xnn.XNNConcatenate2(
                dim, d.float_id(a), d.float_id(b), NONE, NONE, out, 0, NONE
            ),
        )

    def depthwise_conv(
        self, x: Value, taps: Constant, bias: Constant | None, length: Size
    ) -> Value:
        """Filter each channel along the dim before the last.

        `x` is `[1, T + L - 1, H]`, `taps` `[L, H]`, the result `[1, T, H]` with T `length`.
        """
        width, channels = taps.data.shape
        kernel = constant(taps.data.view(1, 1, width, channels))
        image = self.reshape(x, (1, 1, *x.shape[1:]))
        output_shape = (1, 1, length, channels)

        def node(d: Delegate, out: int) -> Any:
            size = {"kernel_height": 1, "kernel_width": width, "groups": channels}
            steps = {
                f"{name}_{axis}": 1
                for name in ("subsampling", "dilation")
                for axis in ("height", "width")
            }
            padding = {f"padding_{side}": 0 for side in ("top", "right", "bottom", "left")}
            return xnn.XNNDepthwiseConv2d(
                **padding,
                **size,
                **steps,
                group_input_channels=1,
                group_output_channels=1,
                adjustment_height=0,
                adjustment_width=0,
                input1_id=d.float_id(image),
                filter_id=d.float_id(kernel),
                bias_id=NONE if bias is None else d.float_id(bias),
                output_id=out,
                flags=0,
            )

        result = self._add([image], output_shape, node, work=width * channels)
        return self.reshape(result, (1, length, channels))

    def silu(self, x: Value) -> Value:
        return self.multiply(x, self.sigmoid(x))

    def norm(self, x: Value, weight: Value, eps: float) -> Value:
        """Compute the RMS norm along the last dim.

        XNNPACK computes no mean along the last dim; a product with a row of 1 / K replaces it.
        """
        size = max_sizes(x.shape)[-1]
        mean_weight = constant(torch.full((1, size), 1 / size))
        mean = self.linear(self.square(x), mean_weight, scalar(eps))
        return self.multiply(self.multiply(x, self.rsqrt(mean)), weight)


def scalar(value: float) -> Constant:
    """Return a constant of shape `[1]`."""
    return constant(torch.tensor([value]))


def numel_per_token(shape: Shape) -> int:
    """Return the number of elements of a tensor in a call with one token."""
    return math.prod(1 if isinstance(size, Length) else size for size in shape)


def broadcast(a: Shape, b: Shape) -> Shape:
    """Return the broadcast of two shapes."""
    rank = max(len(a), len(b))
    left, right = ((1,) * (rank - len(x)) + tuple(x) for x in (a, b))
    return tuple(y if x == 1 else x for x, y in zip(left, right, strict=True))
