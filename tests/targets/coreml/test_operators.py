"""Every operator of the interpreter, against results worked out from Core ML's documentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lfmc.errors import InputError, UnsupportedError
from lfmc.targets.coreml.interpreter import Interpreter
from lfmc.targets.coreml.library import coremltools
from lfmc.targets.coreml.names import DECODE, PREFILL
from lfmc.targets.coreml.operators import OPERATORS, lut_to_dense
from lfmc.targets.coreml.package import write_package

mb = pytest.importorskip("coremltools.converters.mil").Builder

A = [[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]
B = [[2.0, 2.0, 2.0], [0.5, -1.0, 3.0]]
FLAGS = [[True, False, True], [False, False, True]]

# The name, the operators to emit for inputs x, y float32 (2, 3) and i int32 (2,), the result.
CASES: list[tuple[str, Callable[..., Any], Any]] = [
    ("add", lambda x, y, i: mb.add(x=x, y=y), [[3, 0, 5], [4.5, 4, -3]]),
    ("sub", lambda x, y, i: mb.sub(x=x, y=y), [[-1, -4, 1], [3.5, 6, -9]]),
    ("mul", lambda x, y, i: mb.mul(x=x, y=y), [[2, -4, 6], [2, -5, -18]]),
    ("real_div", lambda x, y, i: mb.real_div(x=x, y=y), [[0.5, -1, 1.5], [8, -5, -2]]),
    ("floor_div", lambda x, y, i: mb.floor_div(x=i, y=np.int32(2)), [-2, 2]),
    ("mod", lambda x, y, i: mb.mod(x=i, y=np.int32(4)), [1, 1]),
    ("greater", lambda x, y, i: mb.greater(x=x, y=y), [[0, 0, 1], [1, 1, 0]]),
    ("less_equal", lambda x, y, i: mb.less_equal(x=x, y=y), [[1, 1, 0], [0, 0, 1]]),
    (
        "logical_or",
        lambda x, y, i: mb.logical_or(x=mb.greater(x=x, y=y), y=FLAGS),
        [[1, 0, 1], [1, 1, 1]],
    ),
    ("cast", lambda x, y, i: mb.cast(x=x, dtype="int32"), [[1, -2, 3], [4, 5, -6]]),
    ("identity", lambda x, y, i: mb.identity(x=x), A),
    ("sigmoid", lambda x, y, i: mb.sigmoid(x=x), [[1 / (1 + math.exp(-v)) for v in r] for r in A]),
    ("silu", lambda x, y, i: mb.silu(x=x), [[v / (1 + math.exp(-v)) for v in r] for r in A]),
    (
        "rsqrt",
        lambda x, y, i: mb.rsqrt(x=mb.mul(x=x, y=x), epsilon=np.float32(3)),
        [[(v * v + 3) ** -0.5 for v in r] for r in A],
    ),
    ("reduce_mean", lambda x, y, i: mb.reduce_mean(x=x, axes=[-1], keep_dims=True), [[2 / 3], [1]]),
    ("reduce_sum", lambda x, y, i: mb.reduce_sum(x=x, axes=[0], keep_dims=False), [5, 3, -3]),
    (
        "softmax",
        lambda x, y, i: mb.softmax(x=x, axis=0),
        [
            [1 / (1 + math.exp(3)), 1 / (1 + math.exp(7)), 1 / (1 + math.exp(-9))],
            [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-7)), 1 / (1 + math.exp(9))],
        ],
    ),
    (
        "linear",
        lambda x, y, i: mb.linear(x=x, weight=np.float32(B), bias=np.float32([10, 20])),
        [[2 - 4 + 6 + 10, 0.5 + 2 + 9 + 20], [8 + 10 - 12 + 10, 2 - 5 - 18 + 20]],
    ),
    ("matmul", lambda x, y, i: mb.matmul(x=x, y=y, transpose_y=True), [[4, 11.5], [6, -21]]),
    (
        "conv",
        lambda x, y, i: mb.conv(
            x=mb.expand_dims(x=x, axes=[0]),
            weight=np.float32([[[1, 10]], [[100, 1]]]),
            bias=np.float32([0.5, 0]),
            groups=2,
            pad_type="valid",
        ),
        [[[1 - 20 + 0.5, -2 + 30 + 0.5], [405, 494]]],
    ),
    (
        "expand_dims",
        lambda x, y, i: mb.expand_dims(x=x, axes=[0, -1]),
        [[[[v] for v in r] for r in A]],
    ),
    ("squeeze", lambda x, y, i: mb.squeeze(x=mb.expand_dims(x=x, axes=[1]), axes=[1]), A),
    ("reshape", lambda x, y, i: mb.reshape(x=x, shape=[3, -1]), [[1, -2], [3, 4], [5, -6]]),
    ("transpose", lambda x, y, i: mb.transpose(x=x, perm=[1, 0]), [[1, 4], [-2, 5], [3, -6]]),
    ("split", lambda x, y, i: mb.split(x=x, split_sizes=[1, 2], axis=1)[1], [[-2, 3], [5, -6]]),
    ("concat", lambda x, y, i: mb.concat(values=[x, y], axis=0), A + B),
    (
        "gather",
        lambda x, y, i: mb.gather(x=x, indices=np.int32([-1, 0]), axis=1),
        [[3, 1], [-6, 4]],
    ),
    (
        "gather_along_axis",
        lambda x, y, i: mb.gather_along_axis(x=x, indices=np.int32([[2, 0], [1, 1]]), axis=1),
        [[3, 1], [5, 5]],
    ),
    ("topk", lambda x, y, i: mb.topk(x=x, k=2, axis=-1)[1], [[2, 0], [1, 0]]),
    (
        "one_hot",
        lambda x, y, i: mb.one_hot(
            indices=mb.mod(x=i, y=np.int32(3)), one_hot_vector_size=3, on_value=2.0, off_value=-1.0
        ),
        [[2, -1, -1], [-1, -1, 2]],
    ),
    (
        "range_1d",
        lambda x, y, i: mb.range_1d(start=np.int32(2), end=np.int32(9), step=np.int32(3)),
        [2, 5, 8],
    ),
    (
        "slice_by_size",
        lambda x, y, i: mb.slice_by_size(x=x, begin=[0, 1], size=[-1, 2]),
        [[-2, 3], [5, -6]],
    ),
    (
        "slice_update",
        lambda x, y, i: mb.slice_update(
            x=x,
            update=np.float32([[9], [8]]),
            begin=[1, 1],
            end=[1, 2],
            stride=[1, 1],
            begin_mask=[True, False],
            end_mask=[True, False],
        ),
        [[1, 9, 3], [4, 8, -6]],
    ),
]


def run(emit: Callable[..., Any], folder: Path, *, exact: bool = True) -> Tensor:
    """Save one operator as a package, load the package, run it, and return the result."""
    from coremltools.converters.mil.mil import Function, types

    ct = coremltools()
    inputs = {
        "x": mb.TensorSpec((2, 3), types.fp32),
        "y": mb.TensorSpec((2, 3), types.fp32),
        "i": mb.TensorSpec((2,), types.int32),
    }
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        result = emit(*(function.inputs[name] for name in inputs))
        if result.dtype == types.bool:
            result = mb.cast(x=result, dtype="int32")
        function.set_outputs([mb.identity(x=result, name="result")])
    write_package({DECODE: function}, folder)
    values = {
        "x": torch.tensor(A),
        "y": torch.tensor(B),
        "i": torch.tensor([-3, 5], dtype=torch.int32),
    }
    return Interpreter(folder, exact=exact).call(DECODE, values, {})["result"]


@pytest.mark.parametrize(("name", "emit", "expected"), CASES, ids=[case[0] for case in CASES])
def test_operator(name: str, emit: Callable[..., Any], expected: Any, tmp_path: Path) -> None:
    actual = run(emit, tmp_path)
    assert list(actual.shape) == list(torch.tensor(expected).shape)
    assert torch.allclose(actual.double(), torch.tensor(expected).double(), atol=1e-6)


def test_every_operator_has_a_case() -> None:
    states = {"read_state", "coreml_update_state"}  # the parity tests cover them with every package
    assert {case[0] for case in CASES} == set(OPERATORS) - states


@pytest.mark.parametrize(("kind", "bits"), [("int4", 4), ("uint4", 4), ("int8", 8), ("uint8", 8)])
def test_blockwise_matrix(kind: str, bits: int, tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import types

    dtype = types.nptype_from_builtin(types.string_to_builtin(kind))
    low = 0 if kind.startswith("u") else -(1 << (bits - 1))
    codes = np.arange(low, low + 12).reshape(3, 4)
    scale, offset = np.float16([[0.5, 2], [1, 3], [0.25, 4]]), np.array([[1, 2], [3, 4], [5, 6]])
    arguments = {"data": codes.astype(dtype), "scale": scale}
    if kind.startswith("u"):
        arguments["offset"] = offset.astype(dtype)
    shift = np.repeat(offset, 2, 1) if kind.startswith("u") else 0
    expected = (codes - shift) * np.repeat(scale.astype(np.float64), 2, 1)
    actual = run(lambda x, y, i: mb.constexpr_blockwise_shift_scale(**arguments), tmp_path)
    assert actual.tolist() == expected.tolist()


def test_lookup_table(tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import types

    indices = np.array([[0, 1, 2, 3], [3, 3, 0, 1]])
    tables = np.float16([[[[-1], [0], [2], [5]]], [[[10], [11], [12], [13]]]])  # one per row
    dtype = types.nptype_from_builtin(types.string_to_builtin("uint2"))
    actual = run(
        lambda x, y, i: mb.constexpr_lut_to_dense(indices=indices.astype(dtype), lut=tables),
        tmp_path,
    )
    assert actual.tolist() == [[-1, 0, 2, 5], [13, 13, 10, 11]]


def test_rounding_is_to_the_declared_dtype(tmp_path: Path) -> None:
    def emit(x: Any, y: Any, i: Any) -> Any:
        return mb.cast(x=mb.mul(x=mb.cast(x=x, dtype="fp16"), y=np.float16(0.1)), dtype="fp32")

    tenth = torch.tensor(0.1).half()
    rounded = (torch.tensor(A) * tenth.float()).half().float()
    assert run(emit, tmp_path / "a", exact=False).tolist() == rounded.tolist()
    wide = torch.tensor(A) * tenth.float()
    assert run(emit, tmp_path / "b", exact=True).tolist() == wide.tolist()


def test_an_unsupported_operator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not support the operator 'atan'"):
        run(lambda x, y, i: mb.atan(x=x), tmp_path)


@pytest.mark.parametrize(
    ("variant", "call"),
    [
        ("conv with padding 'same'", lambda x: OPERATORS["conv"](x, x, pad_type="same")),
        ("gather with batch dims", lambda x: OPERATORS["gather"](x, x, batch_dims=1)),
        ("one_hot along another axis", lambda x: OPERATORS["one_hot"](x, 3, axis=0)),
        ("interleaved concat", lambda x: OPERATORS["concat"]([x, x], 0, interleave=True)),
        (
            "slice_update that squeezes",
            lambda x: OPERATORS["slice_update"](x, x, [0], [1], squeeze_mask=[True]),
        ),
        ("tables of vectors", lambda x: lut_to_dense(x, np.zeros((1, 4, 2)))),
    ],
)
def test_an_unsupported_variant_is_refused(variant: str, call: Callable[[Tensor], object]) -> None:
    with pytest.raises(UnsupportedError, match="does not support this variant") as error:
        call(torch.zeros(2, 3))
    assert variant in str(error.value)


def test_unequal_matrices_may_have_equal_names(tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import Function, types

    ct, functions = coremltools(), {}
    for name, value in ((DECODE, 1), (PREFILL, 2)):
        inputs = {"x": mb.TensorSpec((1, 2), types.fp16)}
        with Function(inputs, opset_version=ct.target.iOS18) as function:
            matrix = mb.constexpr_blockwise_shift_scale(
                data=np.full((3, 2), value, np.int8), scale=np.ones((3, 1), np.float16), name="same"
            )
            y = mb.matmul(x=function.inputs["x"], y=matrix, transpose_y=True, name="result")
            function.set_outputs([y])
        functions[name] = function
    write_package(functions, tmp_path)
    interpreter, x = Interpreter(tmp_path, exact=True), {"x": torch.ones(1, 2)}
    for name, value in ((DECODE, 2), (PREFILL, 4), (DECODE, 2)):
        assert interpreter.call(name, x, {})["result"].tolist() == [[value] * 3]


def test_a_missing_or_broken_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Core ML package"):
        Interpreter(tmp_path, exact=True)
    program = tmp_path / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    program.parent.mkdir(parents=True)
    program.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="can't read the package"):
        Interpreter(tmp_path, exact=True)
