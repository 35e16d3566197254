"""Convert a traced graph to an ONNX model for QNN, with a Q and a DQ for every value.

Torch's exporter converts the operators. Here constants become initializers in the parameters file.
An operator that only moves values (a transpose, a slice) gets a Q and a DQ with the step of its
input, because QNN requires them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset23

import lfmc.targets.npu.rounding_operator  # noqa: F401  (registers the rounding)
from lfmc.errors import GateError
from lfmc.machine.quiet import quiet
from lfmc.targets.npu.constants import Matrix, NpuConstants
from lfmc.targets.npu.graph import Graph
from lfmc.targets.shared.parameters_file import PARAMETERS, Parameter, Parameters

OPSET = 23
CODES = {8: ir.DataType.UINT8, 16: ir.DataType.UINT16}  # of values, by bits
SIGNED = {8: ir.DataType.INT8, 16: ir.DataType.INT16}
WEIGHTS = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
FLOATS = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
MOVING = ("Reshape", "Transpose", "Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Gather")
Q, DQ = "QuantizeLinear", "DequantizeLinear"
PARAMETER_KEY = "lfmc.parameter"
VALUE_PREFIX = "kept."  # of the names of rounded values in a model

# Operators that QNN compiled in tests, in graphs that ran on the NPU as a whole (docs/qualcomm.md).
SUPPORTED = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "Conv",
        "DequantizeLinear",
        "Div",
        "Gather",
        "GreaterOrEqual",
        "MatMul",
        "Mul",
        "QuantizeLinear",
        "RMSNormalization",
        "ReduceSum",
        "Reshape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Split",
        "Sub",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)


def count_operators(models: Iterable[ir.Model]) -> dict[str, int]:
    """Count each operator in models."""
    return dict(Counter(node.op_type for model in models for node in model.graph).most_common())


def build_model(
    graph: Graph, constants: NpuConstants, outputs: list[str], *, rounded: bool
) -> ir.Model:
    """Return the ONNX model of a graph; `save` writes its constants.

    `rounded` is true if the graph contains rounding operators.
    """
    inputs = [*graph.interface.inputs, *map(_name, graph.constants)]
    with quiet("torch.onnx", "onnxscript"):
        program = torch.onnx.export(
            graph.exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table={torch.ops.lfm_npu.round.default: _convert_rounding},
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    _name_values(model.graph, len(graph.value_names) if rounded else 0)
    for sources in graph.constants:
        _bind_constant(model, _name(sources), constants.constant(sources))
    _propagate_steps(model.graph)
    _strip(model.graph)
    return model


def save(model: ir.Model, file: Parameters, path: Path) -> None:
    """Write a model whose constants are in a parameters file beside it."""
    for value in model.graph.initializers.values():
        parameter_name = value.metadata_props.pop(PARAMETER_KEY, None)
        if parameter_name is None:
            continue
        offset, size = file.byte_range(parameter_name)
        assert value.type is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            PARAMETERS,
            offset,
            size,
            value.type.dtype,
            shape=value.shape,
            name=str(value.name),
            base_dir=path.parent,
        )
    ir.save(model, path)


def value_name(index: int) -> str:
    """Return the name of a rounded value in a model."""
    return f"{VALUE_PREFIX}{index}"


def _name_values(graph: ir.Graph, count: int) -> None:
    values = [node.outputs[0] for node in graph if node.op_type == DQ]
    if len(values) != count:
        raise GateError(
            "the ONNX graph quantizes another number of values than the program",
            expected=f"{count} values",
            got=len(values),
            todo="this is a bug in lfmc; please report it",
        )
    for index, value in enumerate(values):
        if not value.is_graph_output():
            value.name = value_name(index)


def _name(sources: tuple[str, ...]) -> str:
    return "+".join(sources)


def _convert_rounding(x: Any, scale: float, zero: int, bits: int, signed: bool) -> Any:
    """Convert a rounding operator to ONNX."""
    op: Any = opset23  # onnxscript types its operators for ONNX values
    step = op.Constant(value_float=scale)
    dtype = SIGNED[bits] if signed else CODES[bits]
    zero_point = op.Cast(op.Constant(value_int=0 if signed else zero), to=int(dtype))
    return op.DequantizeLinear(op.QuantizeLinear(x, step, zero_point), step, zero_point)


def _bind_constant(model: ir.Model, name: str, constant: Matrix | Parameter) -> None:
    """Replace an input of the model by a constant."""
    graph = model.graph
    value = next(graph_input for graph_input in graph.inputs if graph_input.name == name)
    graph.inputs.remove(value)
    if isinstance(constant, Matrix):
        codes = _initializer(graph, constant.codes, WEIGHTS[constant.bits], constant.shape)
        scales = _initializer(graph, constant.scales, ir.DataType.FLOAT)
        # ONNX allows to omit zero points of 0, but QNN then reads 4-bit codes as unsigned.
        zeros = _zero_points(graph, constant)
        inputs = [codes, scales, zeros]
        node = ir.Node("", DQ, inputs, [ir.AttrInt64("axis", 1)], num_outputs=1)
    else:
        floats = _initializer(graph, constant, FLOATS[constant.dtype])
        to = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        node = ir.Node("", "Cast", [floats], [to], num_outputs=1)
    graph.insert_before(graph[0], node)
    result = node.outputs[0]
    result.name, result.shape, result.type = f"{name}.value", value.shape, value.type
    value.replace_all_uses_with(result)


def _zero_points(graph: ir.Graph, matrix: Matrix) -> ir.Value:
    """Return zero points of 0 for every column, shared by matrices of equal bits and rows."""
    rows, dtype = matrix.shape[1], WEIGHTS[matrix.bits]
    name = f"zeros.{matrix.bits}.{rows}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.zeros(rows, dtype.numpy()), dtype=dtype, name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape([rows]), type=ir.TensorType(dtype), const_value=tensor
        )
    return graph.initializers[name]


def _initializer(
    graph: ir.Graph, parameter: Parameter, dtype: ir.DataType, shape: tuple[int, ...] | None = None
) -> ir.Value:
    name, shape = parameter.name, shape or parameter.shape
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.metadata_props[PARAMETER_KEY] = name
    graph.initializers[name] = value
    return value


def _strip(graph: ir.Graph) -> None:
    """Remove the exporter's metadata, long names, and inferred shapes: most of the model's size."""
    for index, node in enumerate(graph):
        node.metadata_props.clear()
        node.name = f"n{index}"
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None  # ONNX Runtime infers them
            if not value.is_graph_output() and not str(value.name).startswith(VALUE_PREFIX):
                value.name = f"v{index}.{value.index()}"
    constants = [
        value for value in graph.initializers.values() if PARAMETER_KEY not in value.metadata_props
    ]
    for index, value in enumerate(constants):
        value.name = f"c{index}"


def _propagate_steps(graph: ir.Graph) -> None:
    """Insert a Q and a DQ behind each operator that moves values, with the step of its input."""
    steps: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        first, *rest = node.inputs
        assert first is not None
        if node.op_type == DQ and first.producer() is not None:
            scale, zero = rest
            assert scale is not None
            assert zero is not None
            steps[node.outputs[0]] = scale, zero
        if node.op_type not in MOVING or first not in steps:
            continue
        last = node
        for value in node.outputs:
            users = [user for user, _ in value.uses()]
            if users and all(user.op_type == Q for user in users):
                continue
            step = steps[first]
            last = _insert_pair(graph, last, value, *step)
            steps[last.outputs[0]] = step


def expose_values(path: Path, count: int) -> ir.Model:
    """Load a saved model and add its rounded values to its outputs."""
    model = ir.load(path)
    values = {
        value.name: value for node in model.graph if node.op_type == DQ for value in node.outputs
    }
    for index in range(count):
        value = values.get(value_name(index))
        if value is not None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    return model


def _insert_pair(
    graph: ir.Graph, after: ir.Node, value: ir.Value, scale: ir.Value, zero: ir.Value
) -> ir.Node:
    """Insert a Q and a DQ behind a value, and return the DQ."""
    is_output, name = value.is_graph_output(), value.name
    codes = ir.Node("", Q, [value, scale, zero], num_outputs=1)
    dequantized = ir.Node("", DQ, [codes.outputs[0], scale, zero], num_outputs=1)
    result = dequantized.outputs[0]
    result.shape, result.type = value.shape, value.type
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    codes.replace_input_with(0, value)
    if is_output:
        value.name, result.name = f"{name}_moved", name
    graph.insert_after(after, [codes, dequantized])
    return dequantized
