"""Serialization of one XNNPACK delegate: its nodes, values and constants."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)
from torch import Tensor

from lfmc.targets.executorch.steps import (
    Constant,
    Matrix,
    Value,
    XnnpackStep,
    byte_view,
    max_sizes,
)

TYPES = xnn.XNNDatatype
Bytes = bytes | memoryview


class Delegate:
    """A delegate's graph. A value gets its id at its first use. Constants are keyed by the hash of
    their bytes, so that delegates share equal constants."""

    def __init__(self, steps: Sequence[XnnpackStep], outputs: Sequence[Value]) -> None:
        internal = {id(step.outputs[0]) for step in steps}
        external = {id(x): x for step in steps for x in step.inputs if id(x) not in internal}
        self.inputs, self.outputs = tuple(external.values()), tuple(outputs)
        self.constants: dict[str, Bytes] = {}
        self._ids: dict[int, int] = {}
        self._rounded_ids: dict[int, int] = {}
        self._values: list[xnn.XValue] = []
        self._nodes: list[xnn.XNode] = []
        self._data = [xnn.ConstantDataOffset(0, 0)]
        self._input_ids: list[int] = []
        self._output_ids: list[int] = []
        for value in self.inputs:
            self._input_ids.append(self._define_external(value, XNN_VALUE_FLAG_EXTERNAL_INPUT))
        for value in self.outputs:
            self._output_ids.append(self._define_external(value, XNN_VALUE_FLAG_EXTERNAL_OUTPUT))
        for step in steps:
            step.emit(self)

    def payload(self) -> bytes:
        """Return the delegate's bytes in a .pte, without its constants."""
        graph = xnn.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(self.inputs) + len(self.outputs),
            input_ids=self._input_ids,
            output_ids=self._output_ids,
            constant_data=self._data,
        )
        return bytes(serialize_xnnpack_binary(graph, bytearray()))

    def add_node(self, node: Any) -> None:
        self._nodes.append(xnn.XNode(node, debug_handle=len(self._nodes)))

    def float_id(self, value: Value) -> int:
        """Return the id of a float value."""
        if id(value) not in self._ids:
            data_index = self._store(value.data) if isinstance(value, Constant) else 0
            self._ids[id(value)] = self._define(
                TYPES.xnn_datatype_fp32, max_sizes(value.shape), data_index
            )
        return self._ids[id(value)]

    def rounded_id(self, value: Value) -> int:
        """Return the id of a value whose rows are rounded to int8."""
        if id(value) not in self._rounded_ids:
            source_id = self.float_id(value)
            rounded_id = self._define(
                TYPES.xnn_datatype_qdint8, max_sizes(value.shape), 0, xnn.PerTokenDynamicQuant(1)
            )
            self.add_node(xnn.XNNConvert(source_id, rounded_id, 0))
            self._rounded_ids[id(value)] = rounded_id
        return self._rounded_ids[id(value)]

    def matrix_id(self, matrix: Matrix) -> int:
        """Return the id of an n-bit weight."""
        if id(matrix) not in self._ids:
            codes_index, scales_index = self._store(matrix.codes), self._store(matrix.scales)
            dtype: Any = TYPES.xnn_datatype_qcint8
            params: Any = xnn.PerChannelQuant([], 0, scales_index, matrix.scales.numel())
            if matrix.bits == 4:
                dtype = TYPES.xnn_datatype_qbint4
                params = xnn.PerChannelGroupQuant(
                    [],
                    0,
                    matrix.group,
                    scale_buffer_idx=scales_index,
                    num_scales=matrix.scales.numel(),
                )
            self._ids[id(matrix)] = self._define(dtype, list(matrix.shape), codes_index, params)
        return self._ids[id(matrix)]

    def copy_value(self, value: xnn.XNNQuantizedTensorValue, constants: Sequence[Bytes]) -> int:
        """Copy a value of another delegate, with its codes and scales; return the id."""
        tensor, params = value.tensor_value, value.quant_params
        codes_index = 0
        if constants:
            codes_index, scales_index = map(self._store_bytes, constants)
            params = replace(params, scale_buffer_idx=scales_index)
        return self._define(tensor.datatype, tensor.dims, codes_index, params)

    def _define_external(self, value: Value, flag: int) -> int:
        external_id = len(self._ids)
        value_id = self._define(
            TYPES.xnn_datatype_fp32,
            max_sizes(value.shape),
            0,
            external_id=external_id,
            flags=flag,
        )
        self._ids[id(value)] = value_id
        return value_id

    def _define(
        self,
        dtype: Any,
        dims: list[int],
        data_index: int,
        quant_params: Any = None,
        external_id: int = XNN_INVALID_VALUE_ID,
        flags: int = 0,
    ) -> int:
        value_id = len(self._values)
        value: Any = xnn.XNNTensorValue(
            dtype, len(dims), dims, data_index, external_id, flags, value_id
        )
        if quant_params is not None:
            value = xnn.XNNQuantizedTensorValue(value, quant_params)
        self._values.append(xnn.XValue(value))
        return value_id

    def _store(self, data: Tensor) -> int:
        return self._store_bytes(byte_view(data))

    def _store_bytes(self, raw: Bytes) -> int:
        key = constant_key(raw)
        self.constants[key] = raw
        self._data.append(xnn.ConstantDataOffset(UINT64_MAX, len(raw), key))
        return len(self._data) - 1


def constant_key(raw: Bytes) -> str:
    """Return the key of a constant with these bytes."""
    return base64.b85encode(hashlib.sha256(raw).digest()[:16]).decode()
