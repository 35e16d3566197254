"""Read constants back from a saved model, to compare the bytes on disk with the plan."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.errors import InputError
from lfmc.targets.base import require
from lfmc.targets.onnx.emitter import model_path


def read_initializer(folder: Path, name: str) -> Tensor:
    """Read an initializer in its stored dtype (uint8, float16, bfloat16 or float32)."""
    onnx = require("onnx", "onnx")
    path = model_path(folder)
    initializers = _initializers(path, path.stat().st_mtime_ns)
    if name not in initializers:
        raise InputError(f"the model has no constant '{name}'", where=path)
    proto = onnx.TensorProto()
    proto.CopyFrom(initializers[name])
    onnx.external_data_helper.load_external_data_for_tensor(proto, str(path.parent))
    dtypes = {
        onnx.TensorProto.UINT8: torch.uint8,
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
    }
    raw = torch.frombuffer(bytearray(proto.raw_data), dtype=torch.uint8)
    return raw.view(dtypes[proto.data_type]).reshape(tuple(proto.dims))


@lru_cache(maxsize=2)
def _initializers(path: Path, stamp: int) -> dict[str, Any]:
    """Return the constants of a model file by name, without data. `stamp` is its mtime."""
    onnx = require("onnx", "onnx")
    model = onnx.load(path, load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}
