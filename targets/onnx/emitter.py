"""Build the ONNX graph on a tape, and write large constants directly to the data file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lfmc.targets.base import Arrangement, StoredTensor

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
WEB_MODEL_FILE = "onnx/model.onnx"  # the names that transformers.js loads
WEB_DATA_FILE = "onnx/model.onnx_data"
NUM_LOGITS = "num_logits_to_keep"  # an input that transformers.js sets if a model has it
CONTRIB = "com.microsoft"
OPSETS = {"": 23, CONTRIB: 1}
ALIGNMENT = 64
CONTEXT_KEY = "lfmc.context"  # a key of the model's metadata; the value is JSON

_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
    torch.int64: ir.DataType.INT64,
}


def model_path(folder: Path) -> Path:
    """Return the model file of the artifact in `folder`, in any layout."""
    web = folder / WEB_MODEL_FILE
    return web if web.is_file() else folder / MODEL_FILE


class Emitter:
    """Collect the nodes of one graph. `stored` lists the checkpoint tensors that were written."""

    def __init__(
        self, folder: Path, model_file: str = MODEL_FILE, data_file: str = DATA_FILE
    ) -> None:
        self.tape = ir.tape.Tape()
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.stored: list[StoredTensor] = []
        self._constants: dict[str, ir.Value] = {}
        self._model_path, self._data_path = folder / model_file, folder / data_file
        self._data_path.parent.mkdir(exist_ok=True)
        self._data = self._data_path.open("wb")

    def op(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output."""
        return self.tape.op(kind, inputs, attributes=attributes, domain=domain)

    def ops(
        self, count: int, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node with `count` outputs."""
        return self.tape.op_multi_out(
            kind, inputs, attributes=attributes, num_outputs=count, domain=domain
        )

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Declare a float32 output of the model."""
        value.name = name
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(shape)
        self.outputs.append(value)

    def describe(self, values: Sequence[ir.Value]) -> list[dict[str, Any]]:
        """Return name, dtype (as in NumPy) and shape of inputs or outputs, as JSON values."""
        return [
            {
                "name": value.name,
                "dtype": str(value.dtype.numpy()) if value.dtype else None,
                "shape": [
                    dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()
                ],
            }
            for value in values
        ]

    def constant(self, value: np.ndarray[Any, Any]) -> ir.Value:
        """Add a small constant to the graph; equal constants are stored once."""
        name = f"c{value.dtype}_{list(value.shape)}_{value.tobytes().hex()}"
        if name not in self._constants:
            tensor = ir.tensor(value, name=f"constant.{len(self._constants)}")
            self._constants[name] = self.tape.initializer(tensor)
        return self._constants[name]

    def number(self, value: float) -> ir.Value:
        """Add a float32 constant `[1]`."""
        return self.constant(np.array([value], np.float32))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def weight(
        self, name: str, part: str, sources: tuple[str, ...], value: Tensor, order: Arrangement
    ) -> ir.Value:
        """Write a constant of the checkpoint to the data file, and widen 16-bit floats by a Cast.

        ONNX Runtime folds the Cast when a session starts, so the file stores 16 bits and the
        kernels read float32.
        """
        full_name = f"{name}.{part}" if part != "values" else name
        if full_name in self._constants:
            return self._constants[full_name]
        value = value.contiguous()
        raw = value.flatten().view(torch.uint8).numpy().data  # no copy
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        tensor = ir.ExternalTensor(
            self._data_path.name,
            self._data.tell(),
            len(raw),
            _DTYPES[value.dtype],
            shape=ir.Shape(value.shape),
            name=full_name,
            base_dir=self._data_path.parent,
        )
        self._data.write(raw)
        result = self.tape.initializer(tensor)
        if value.dtype in (torch.float16, torch.bfloat16):
            result = self.op("Cast", result, to=int(ir.DataType.FLOAT))
        self._constants[full_name] = result
        self.stored.append(StoredTensor(full_name, part, sources, order, len(raw)))
        return result

    def save(self, name: str, metadata: dict[str, str]) -> None:
        """Close the data file, which is complete already, and write the model file."""
        self._data.close()
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports=OPSETS,
            name=name,
        )
        model = ir.Model(graph, ir_version=11, producer_name="lfmc")
        model.metadata_props.update(metadata)
        ir.save(model, self._model_path)
