"""A parameters file: a safetensors file that is written and memory-mapped tensor by tensor.

The header describes the inputs of an artifact's functions, so that a host needs no other file:
`__metadata__` has the key `lfmc`, whose value is JSON. Tensors begin at multiples of 64 bytes.
Tensors whose size is not a multiple of 64 bytes come last, and only the first of these is aligned
for certain.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmc.errors import InputError

PARAMETERS = "params.safetensors"
ALIGNMENT = 64
KEY = "lfmc"
# The dtype of safetensors and of torch, by name.
DTYPES: Mapping[str, tuple[str, torch.dtype]] = {
    "uint32": ("U32", torch.uint32),
    "uint8": ("U8", torch.uint8),
    "int8": ("I8", torch.int8),
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "int32": ("I32", torch.int32),
}


@dataclass(frozen=True)
class Parameter:
    """A tensor of the file; `make` computes its value when the file is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][1].itemsize


def write(path: Path, parameters: list[Parameter], facts: Mapping[str, Any]) -> None:
    """Write the tensors, with one in memory at a time, and the facts that a host needs."""
    ordered = sorted(parameters, key=lambda p: p.nbytes % ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(facts)}}
    begin = 0
    for parameter in ordered:
        header[parameter.name] = {
            "dtype": DTYPES[parameter.dtype][0],
            "shape": list(parameter.shape),
            "data_offsets": [begin, begin + parameter.nbytes],
        }
        begin += parameter.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parameter in ordered:
            value = parameter.make().contiguous()
            if value.numel() * value.element_size() != parameter.nbytes:
                raise ValueError(f"'{parameter.name}' does not have its declared size")
            file.write(value.flatten().view(torch.uint8).numpy().data)  # no copy


@dataclass(frozen=True)
class Parameters:
    """A memory-mapped parameters file. Tensors are views of the file, read when they are used."""

    facts: Mapping[str, Any]
    _header: Mapping[str, Any]
    _data: mmap.mmap
    _start: int

    @property
    def names(self) -> Collection[str]:
        return self._header.keys()

    def byte_range(self, name: str) -> tuple[int, int]:
        """Return the offset of a tensor in the file and its size, in bytes."""
        begin, end = self._header[name]["data_offsets"]
        return self._start + begin, end - begin

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype and shape."""
        entry = self._header[name]
        begin, size = self.byte_range(name)
        dtype = next(dtype for kind, dtype in DTYPES.values() if kind == entry["dtype"])
        raw = np.frombuffer(self._data, np.uint8, size, begin)
        return torch.from_numpy(raw).view(dtype).view(entry["shape"])


def open_parameters(folder: Path, name: str = PARAMETERS) -> Parameters:
    """Map the parameters file of a bundle. Raises `InputError` if lfmc did not write it."""
    path = folder / name
    if not path.is_file():
        raise InputError("there is no parameters file", where=path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        facts = json.loads(header.pop("__metadata__")[KEY])
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("the parameters file can't be read", where=path, got=error) from error
    if 8 + size + end != len(data):
        raise InputError(
            "the parameters file is not complete",
            where=path,
            expected=f"{8 + size + end} bytes",
            got=len(data),
        )
    return Parameters(facts, header, data, 8 + size)
