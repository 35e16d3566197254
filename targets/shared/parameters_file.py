"""A parameters file: a safetensors file that is written, and mapped, tensor by tensor.

Its header says what an artifact's functions take, so that a host needs nothing else: `__metadata__`
has the key `lfmc`, JSON. Tensors begin at multiples of 64 bytes, but for those behind one whose
size is none.
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
# By their names: safetensors' and torch's.
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
    """A tensor of the file; `make` gives its value when it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][1].itemsize


def write(path: Path, parameters: list[Parameter], facts: Mapping[str, Any]) -> None:
    """Write the tensors, one at a time in memory, and what a host has to know."""
    ordered = sorted(parameters, key=lambda p: p.nbytes % ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(facts)}}
    at = 0
    for own in ordered:
        kind = DTYPES[own.dtype][0]
        offsets = [at, at + own.nbytes]
        header[own.name] = {"dtype": kind, "shape": list(own.shape), "data_offsets": offsets}
        at += own.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for own in ordered:
            value = own.make().contiguous()
            if value.numel() * value.element_size() != own.nbytes:
                raise ValueError(f"'{own.name}' is not as large as it was said to be")
            file.write(value.flatten().view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True)
class Parameters:
    """A file that is mapped: tensors are parts of it, read when they are used."""

    facts: Mapping[str, Any]
    _header: Mapping[str, Any]
    _data: mmap.mmap
    _start: int

    @property
    def names(self) -> Collection[str]:
        return self._header.keys()

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor lies in the file, and its size, in bytes."""
        begin, end = self._header[name]["data_offsets"]
        return self._start + begin, end - begin

    def tensor(self, name: str) -> Tensor:
        """In the stored dtype and shape."""
        entry = self._header[name]
        begin, size = self.place(name)
        dtype = next(own for kind, own in DTYPES.values() if kind == entry["dtype"])
        raw = np.frombuffer(self._data, np.uint8, size, begin)
        return torch.from_numpy(raw).view(dtype).view(entry["shape"])


def open_parameters(folder: Path, name: str = PARAMETERS) -> Parameters:
    """Map the file of a bundle; raises `InputError` where it is none of lfmc's."""
    path = folder / name
    if not path.is_file():
        raise InputError("there are no parameters", where=path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        facts = json.loads(header.pop("__metadata__")[KEY])
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("the parameters can't be read", where=path, got=error) from error
    if 8 + size + end != len(data):
        raise InputError(
            "the parameters are not complete",
            where=path,
            expected=f"{8 + size + end} bytes",
            got=len(data),
        )
    return Parameters(facts, header, data, 8 + size)
