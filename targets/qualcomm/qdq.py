"""A traced graph as an ONNX model for QNN: every value between operators has a Q and a DQ.

Torch's exporter makes the operators; here constants become initializers in the parameters file, and
what only moves values (a transpose, a slice) gets the step of what it moves, as QNN wants it.
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


# Operators that QNN was seen to compile, all of a graph on the NPU (docs/qualcomm.md).
TAKEN = frozenset(
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


def operators(models: Iterable[ir.Model]) -> dict[str, int]:
    """How often models have each operator."""
    return dict(Counter(node.op_type for model in models for node in model.graph).most_common())


def model_of(
    graph: Graph, constants: NpuConstants, outputs: list[str], *, rounded: bool
) -> ir.Model:
    """The model, whose constants `save` places; `rounded` where the graph rounds what it keeps."""
    inputs = [*graph.interface.inputs, *map(_name, graph.constants)]
    with quiet("torch.onnx", "onnxscript"):
        program = torch.onnx.export(
            graph.exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table={torch.ops.lfm_npu.round.default: _round},
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    _name_kept(model.graph, len(graph.kept) if rounded else 0)
    for sources in graph.constants:
        _place(model, _name(sources), constants.constant(sources))
    _complete(model.graph)
    _strip(model.graph)
    return model


def save(model: ir.Model, held: Parameters, path: Path) -> None:
    """Write a model whose constants lie in a parameters file beside it."""
    for value in model.graph.initializers.values():
        place = value.metadata_props.pop(PLACE, None)
        if place is None:
            continue
        offset, size = held.place(place)
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


PLACE = "lfmc.parameter"
KEPT = "kept."


def kept_name(index: int) -> str:
    """Of a value that the graph keeps, in a model."""
    return f"{KEPT}{index}"


def _name_kept(graph: ir.Graph, count: int) -> None:
    found = [node.outputs[0] for node in graph if node.op_type == DQ]
    if len(found) != count:
        raise GateError(
            "the ONNX graph does not round what the program rounds",
            expected=f"{count} values",
            got=len(found),
            todo="this is a fault of lfmc; please report it",
        )
    for index, value in enumerate(found):
        if not value.is_graph_output():
            value.name = kept_name(index)


def _name(sources: tuple[str, ...]) -> str:
    return "+".join(sources)


def _round(x: Any, scale: float, zero: int, bits: int, signed: bool) -> Any:
    """What a rounding is in ONNX."""
    op: Any = opset23  # its types are of ONNX's values
    step = op.Constant(value_float=scale)
    dtype = SIGNED[bits] if signed else CODES[bits]
    middle = op.Cast(op.Constant(value_int=0 if signed else zero), to=int(dtype))
    return op.DequantizeLinear(op.QuantizeLinear(x, step, middle), step, middle)


def _place(model: ir.Model, name: str, constant: Matrix | Parameter) -> None:
    """Put a constant in place of an input."""
    graph = model.graph
    value = next(own for own in graph.inputs if own.name == name)
    graph.inputs.remove(value)
    if isinstance(constant, Matrix):
        codes = _initializer(graph, constant.codes, WEIGHTS[constant.bits], constant.shape)
        scales = _initializer(graph, constant.scales, ir.DataType.FLOAT)
        # ONNX does without zero points of 0; QNN then reads codes of 4 bits as unsigned.
        zeros = _zeros(graph, constant)
        inputs = [codes, scales, zeros]
        node = ir.Node("", DQ, inputs, [ir.AttrInt64("axis", 1)], num_outputs=1)
    else:
        floats = _initializer(graph, constant, FLOATS[constant.dtype])
        to = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        node = ir.Node("", "Cast", [floats], [to], num_outputs=1)
    graph.insert_before(graph[0], node)
    made = node.outputs[0]
    made.name, made.shape, made.type = f"{name}.value", value.shape, value.type
    value.replace_all_uses_with(made)


def _zeros(graph: ir.Graph, matrix: Matrix) -> ir.Value:
    """Zero points of 0 for every column, one constant for all matrices alike."""
    rows, dtype = matrix.shape[1], WEIGHTS[matrix.bits]
    name = f"zeros.{matrix.bits}.{rows}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.zeros(rows, dtype.numpy()), dtype=dtype, name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape([rows]), type=ir.TensorType(dtype), const_value=tensor
        )
    return graph.initializers[name]


def _initializer(
    graph: ir.Graph, own: Parameter, dtype: ir.DataType, shape: tuple[int, ...] | None = None
) -> ir.Value:
    value = ir.Value(name=own.name, shape=ir.Shape(shape or own.shape), type=ir.TensorType(dtype))
    value.metadata_props[PLACE] = own.name
    graph.initializers[own.name] = value
    return value


def _strip(graph: ir.Graph) -> None:
    """Drop what the exporter tells of Python, long names, and what follows from the rest: most of
    a model's size."""
    for index, node in enumerate(graph):
        node.metadata_props.clear()
        node.name = f"n{index}"
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None  # ONNX Runtime works them out
            if not value.is_graph_output() and not str(value.name).startswith(KEPT):
                value.name = f"v{index}.{value.index()}"
    constants = [own for own in graph.initializers.values() if PLACE not in own.metadata_props]
    for index, value in enumerate(constants):
        value.name = f"c{index}"


def _complete(graph: ir.Graph) -> None:
    """Give what operators move the step of what they move."""
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
            last = _stepped(graph, last, value, *step)
            steps[last.outputs[0]] = step


def probed(path: Path, count: int) -> ir.Model:
    """A saved model that gives every value that it keeps, besides."""
    model = ir.load(path)
    values = {
        value.name: value for node in model.graph if node.op_type == DQ for value in node.outputs
    }
    for index in range(count):
        value = values.get(kept_name(index))
        if value is not None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    return model


def _stepped(
    graph: ir.Graph, after: ir.Node, value: ir.Value, scale: ir.Value, zero: ir.Value
) -> ir.Node:
    """A Q and a DQ behind a value."""
    is_output, name = value.is_graph_output(), value.name
    codes = ir.Node("", Q, [value, scale, zero], num_outputs=1)
    back = ir.Node("", DQ, [codes.outputs[0], scale, zero], num_outputs=1)
    made = back.outputs[0]
    made.shape, made.type = value.shape, value.type
    value.replace_all_uses_with(made, replace_graph_outputs=True)
    codes.replace_input_with(0, value)
    if is_output:
        value.name, made.name = f"{name}_moved", name
    graph.insert_after(after, [codes, back])
    return back
