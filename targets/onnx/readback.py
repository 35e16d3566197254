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
    proto = initializers[name]
    dtypes = {
        onnx.TensorProto.UINT8: torch.uint8,
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
    }
    if not onnx.external_data_helper.uses_external_data(proto):
        raise InputError(f"the constant '{name}' is not in the data file", where=path)
    place = onnx.external_data_helper.ExternalDataInfo(proto)
    data = _map(path.parent / place.location)
    if place.offset + place.length > data.numel():
        raise InputError(
            "the data file is not complete",
            where=path.parent / place.location,
            expected=f"at least {place.offset + place.length} bytes",
            got=data.numel(),
        )
    raw = data[place.offset : place.offset + place.length]
    return raw.view(dtypes[proto.data_type]).reshape(tuple(proto.dims))


def _map(path: Path) -> Tensor:
    """Map a file as uint8; the system reads the bytes that are used."""
    size = path.stat().st_size if path.is_file() else 0
    if size == 0:
        raise InputError("the data file is missing or empty", where=path)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


@lru_cache(maxsize=2)
def _initializers(path: Path, stamp: int) -> dict[str, Any]:
    """Return the constants of a model file by name, without data. `stamp` is its mtime."""
    onnx = require("onnx", "onnx")
    model = onnx.load(path, load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}
