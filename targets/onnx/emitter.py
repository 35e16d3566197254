"""Building the ONNX graph: nodes on a tape, large constants streamed straight to the data file."""

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
CONTRIB = "com.microsoft"
OPSETS = {"": 23, CONTRIB: 1}
ALIGNMENT = 64
CONTEXT_KEY = "lfmc.context"  # in the model's metadata, as JSON

_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
    torch.int64: ir.DataType.INT64,
}


class Emitter:
    """Collects one graph. `stored` lists the checkpoint's tensors as they were written."""

    def __init__(self, folder: Path) -> None:
        self.tape = ir.tape.Tape()
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.stored: list[StoredTensor] = []
        self._constants: dict[str, ir.Value] = {}
        self._data = (folder / DATA_FILE).open("wb")
        self._folder = folder

    def op(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one result."""
        return self.tape.op(kind, inputs, attributes=attributes, domain=domain)

    def ops(
        self, count: int, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """A node with `count` results."""
        return self.tape.op_multi_out(
            kind, inputs, attributes=attributes, num_outputs=count, domain=domain
        )

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Declare a float32 result of the model."""
        value.name = name
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(shape)
        self.outputs.append(value)

    def constant(self, value: np.ndarray[Any, Any]) -> ir.Value:
        """A small constant inside of the graph; equal ones are one."""
        name = f"c{value.dtype}_{list(value.shape)}_{value.tobytes().hex()}"
        if name not in self._constants:
            tensor = ir.tensor(value, name=f"constant.{len(self._constants)}")
            self._constants[name] = self.tape.initializer(tensor)
        return self._constants[name]

    def number(self, value: float) -> ir.Value:
        """A float32 constant `[1]`."""
        return self.constant(np.array([value], np.float32))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def weight(
        self, name: str, part: str, sources: tuple[str, ...], value: Tensor, order: Arrangement
    ) -> ir.Value:
        """A constant of the checkpoint, in the data file; half precision is widened at load.

        ONNX Runtime folds the Cast when a session starts, so the file holds 16 bits and the
        kernels see float32.
        """
        full = f"{name}.{part}" if part != "values" else name
        if full in self._constants:
            return self._constants[full]
        plain = value.contiguous()
        raw = plain.flatten().view(torch.uint8).numpy().tobytes()
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        tensor = ir.ExternalTensor(
            DATA_FILE,
            self._data.tell(),
            len(raw),
            _DTYPES[plain.dtype],
            shape=ir.Shape(plain.shape),
            name=full,
            base_dir=self._folder,
        )
        self._data.write(raw)
        result = self.tape.initializer(tensor)
        if plain.dtype in (torch.float16, torch.bfloat16):
            result = self.op("Cast", result, to=int(ir.DataType.FLOAT))
        self._constants[full] = result
        self.stored.append(StoredTensor(full, part, sources, order, len(raw)))
        return result

    def save(self, name: str, metadata: dict[str, str]) -> None:
        """Write the model file; the data file is complete already."""
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
        ir.save(model, self._folder / MODEL_FILE)
