"""Finds the weight files of a folder, reads their headers, and reads one tensor at a time.

Every tensor gets the name that a text-only checkpoint on the hub has (`model.layers.0...`).
`lfmc.checkpoint.tensor_names` lists the names that other programs write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lfmc.checkpoint.tensor_names import (
    Part,
    decoder_name,
    decoder_parts,
    is_of_another_tower,
    is_unused,
)
from lfmc.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Name in a file: the name in torch, and the bytes of a value.
DTYPES: Mapping[str, tuple[str, int]] = {
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}


@dataclass(frozen=True)
class LowRank:
    """A LoRA adapter of one matrix: `scale * b @ a`, or its transpose for an embedding."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def values(self) -> Tensor:
        """Return the values that the adapter adds, in float32."""
        product = self.scale * (read_tensor(self.b).float() @ read_tensor(self.a).float())
        return product.T if self.transposed else product


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, without its data.

    `shape` is that of the loaded tensor, `stored_dtype` a key of `DTYPES`. `part` selects an
    expert's rows of a packed tensor on disk. The loaded values are `gain` times the stored ones,
    plus those of `adapter`.
    """

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    file: Path
    disk_name: str
    part: Part | None = None
    gain: float = 1.0
    adapter: LowRank | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.stored_dtype][1]

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.stored_dtype][0])
        return dtype


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors by name. Each access loads the tensor again; nothing is cached."""

    def __init__(self, names: Iterable[str], load: Callable[[str], Tensor]) -> None:
        self._names, self._load = dict.fromkeys(names), load

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weight_files(path: Path) -> list[Path]:
    """Return the weight files of the folder `path`.

    Raise `InputError` if there are none, if they are pickles, or if the index lists files that do
    not exist.
    """
    if (path / SINGLE).is_file():  # also beside an index, as in transformers
        return [path / SINGLE]
    index = path / INDEX
    if index.is_file():
        return _indexed_files(index)
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise InputError(
            "the weights are Python pickles, which lfmc never loads: they can run code",
            where=path,
            expected=f"{SINGLE} or {INDEX}",
            got=", ".join(pickles),
            todo="convert them to safetensors if you trust them",
        )
    raise InputError("the folder contains no weights", where=path, expected=f"{SINGLE} or {INDEX}")


def _indexed_files(index: Path) -> list[Path]:
    """Return the files that an index lists; raise `InputError` if one does not exist."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("the weight index lists no files", where=index, expected="weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise InputError(
                "the weight index points outside its folder",
                where=index,
                expected="plain file names",
                got=repr(name),
            )
        if not (index.parent / name).is_file():
            raise InputError("a weight file is missing", where=index.parent / name)
    return [index.parent / name for name in names]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the decoder's tensors in a weight file, by name.

    Raise `InputError` if the file can't be read, or for a dtype that lfmc does not quantize from.
    """
    tensors = {}
    for stored in read_stored(file):
        for name, part in decoder_parts(stored.disk_name, stored.shape):
            shape = stored.shape if part is None else part.shape(stored.shape)
            tensors[name] = replace(stored, name=name, shape=shape, part=part)
    return tensors


def read_stored(file: Path) -> list[TensorInfo]:
    """Return all tensors of a weight file as they are stored, except those of other towers.

    Raise `InputError` if the file can't be read, or for a dtype that lfmc does not quantize from.
    """
    tensors = []
    try:
        with safe_open(file, "np") as stream:  # headers only; "pt" would import torch
            for disk_name in stream.keys():  # noqa: SIM118 (not a mapping)
                if is_of_another_tower(disk_name):
                    continue
                tensor = stream.get_slice(disk_name)
                dtype = tensor.get_dtype()
                if dtype not in DTYPES and is_unused(decoder_name(disk_name)):
                    continue
                if dtype not in DTYPES:
                    raise InputError(
                        f"tensor '{disk_name}' has a dtype that lfmc does not quantize from",
                        where=file,
                        expected=", ".join(DTYPES),
                        got=dtype,
                    )
                shape = tuple(tensor.get_shape())
                tensors.append(TensorInfo(disk_name, shape, dtype, file, disk_name))
    except (SafetensorError, OSError) as error:
        raise InputError(
            "a weight file is truncated or corrupted",
            where=file,
            got=error,
            todo="download it again",
        ) from error
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """Return a tensor, unchecked. The file is memory-mapped and read lazily."""
    try:
        with safe_open(info.file, "pt") as stream:
            if info.part is None:
                tensor: Tensor = stream.get_tensor(info.disk_name)
            else:
                tensor = info.part.read(stream.get_slice(info.disk_name))
    except (SafetensorError, OSError) as error:
        raise InputError("a weight file can't be read", where=info.file, got=error) from error
    if info.gain != 1.0:
        tensor = info.gain * tensor.float()
    if info.adapter is not None:
        tensor = tensor.float() + info.adapter.values()
    return tensor


def read_text(path: Path) -> str:
    """Return a UTF-8 file of a checkpoint; raise `InputError` if it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} can't be read", where=path, got=error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raise `InputError` if there is none."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # bad JSON, 5000 digits
        raise InputError(f"{path.name} can't be read", where=path, got=error) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not a JSON object", where=path)
    return value
