"""One XNNPACK delegate: nodes and values in the form that its part of a .pte has."""

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

from lfmc.targets.executorch.steps import Constant, Inside, Matrix, Value, as_bytes, most

TYPES = xnn.XNNDatatype


class Delegate:
    """Values get numbers as they are first asked for; constants are kept by the hash of their
    bytes, so that delegates share what is equal."""

    def __init__(self, steps: Sequence[Inside], outputs: Sequence[Value]) -> None:
        made = {id(step.outputs[0]) for step in steps}
        used = {id(x): x for step in steps for x in step.inputs if id(x) not in made}
        self.inputs, self.outputs = tuple(used.values()), tuple(outputs)
        self.constants: dict[str, bytes] = {}
        self._ids: dict[int, int] = {}
        self._rounded: dict[int, int] = {}
        self._values: list[xnn.XValue] = []
        self._nodes: list[xnn.XNode] = []
        self._data = [xnn.ConstantDataOffset(0, 0)]
        self._input_ids: list[int] = []
        self._output_ids: list[int] = []
        for value in self.inputs:
            self._input_ids.append(self._external(value, XNN_VALUE_FLAG_EXTERNAL_INPUT))
        for value in self.outputs:
            self._output_ids.append(self._external(value, XNN_VALUE_FLAG_EXTERNAL_OUTPUT))
        for step in steps:
            step.emit(self)

    def payload(self) -> bytes:
        """What a .pte holds of a delegate besides its constants."""
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

    def node(self, node: Any) -> None:
        self._nodes.append(xnn.XNode(node, debug_handle=len(self._nodes)))

    def id(self, value: Value) -> int:
        """The number of a float value."""
        if id(value) not in self._ids:
            held = self._store(value.data) if isinstance(value, Constant) else 0
            self._ids[id(value)] = self._define(TYPES.xnn_datatype_fp32, most(value.shape), held)
        return self._ids[id(value)]

    def rounded(self, value: Value) -> int:
        """The number of a value with every row rounded to int8."""
        if id(value) not in self._rounded:
            source = self.id(value)
            found = self._define(
                TYPES.xnn_datatype_qdint8, most(value.shape), 0, xnn.PerTokenDynamicQuant(1)
            )
            self.node(xnn.XNNConvert(source, found, 0))
            self._rounded[id(value)] = found
        return self._rounded[id(value)]

    def matrix(self, matrix: Matrix) -> int:
        """The number of an n-bit weight."""
        if id(matrix) not in self._ids:
            held, scales = self._store(matrix.codes), self._store(matrix.scales)
            kind: Any = TYPES.xnn_datatype_qcint8
            steps: Any = xnn.PerChannelQuant([], 0, scales, matrix.scales.numel())
            if matrix.bits == 4:
                kind = TYPES.xnn_datatype_qbint4
                steps = xnn.PerChannelGroupQuant(
                    [],
                    0,
                    matrix.group,
                    scale_buffer_idx=scales,
                    num_scales=matrix.scales.numel(),
                )
            self._ids[id(matrix)] = self._define(kind, list(matrix.shape), held, steps)
        return self._ids[id(matrix)]

    def copy(self, value: xnn.XNNQuantizedTensorValue, constants: Sequence[bytes]) -> int:
        """The number of a value like one of another delegate, with its codes and scales."""
        tensor, steps = value.tensor_value, value.quant_params
        held = 0
        if constants:
            held, scales = map(self._keep, constants)
            steps = replace(steps, scale_buffer_idx=scales)
        return self._define(tensor.datatype, tensor.dims, held, steps)

    def _external(self, value: Value, flag: int) -> int:
        number = len(self._ids)
        found = self._define(
            TYPES.xnn_datatype_fp32, most(value.shape), 0, external=number, flags=flag
        )
        self._ids[id(value)] = found
        return found

    def _define(
        self,
        kind: Any,
        dims: list[int],
        held: int,
        steps: Any = None,
        external: int = XNN_INVALID_VALUE_ID,
        flags: int = 0,
    ) -> int:
        found = len(self._values)
        value: Any = xnn.XNNTensorValue(kind, len(dims), dims, held, external, flags, found)
        if steps is not None:
            value = xnn.XNNQuantizedTensorValue(value, steps)
        self._values.append(xnn.XValue(value))
        return found

    def _store(self, data: Tensor) -> int:
        return self._keep(as_bytes(data))

    def _keep(self, raw: bytes) -> int:
        key = base64.b85encode(hashlib.sha256(raw).digest()[:16]).decode()
        self.constants[key] = raw
        self._data.append(xnn.ConstantDataOffset(UINT64_MAX, len(raw), key))
        return len(self._data) - 1
