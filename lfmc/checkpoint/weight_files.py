"""Finds the weight files of a folder, reads their headers, and reads one tensor at a time.

Tensor names are those on disk, with one exception: in a vision-language checkpoint, tensors of the
language tower get the names of a text-only checkpoint (`model.layers.0...`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

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

_TOWER_PREFIXES = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)
_OTHER_TOWERS = re.compile(r"^(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, without its data. `stored_dtype` is a key of `DTYPES`."""

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    file: Path
    disk_name: str

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
    index = path / INDEX
    if index.is_file():
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
            if not (path / name).is_file():
                raise InputError("a weight file is missing", where=path / name)
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
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


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the decoder's tensors in a weight file, by name.

    Raise `InputError` if the file can't be read, or for a dtype that lfmc does not quantize from.
    """
    tensors = {}
    try:
        with safe_open(file, "np") as stream:  # headers only; "pt" would import torch
            for disk_name in stream.keys():  # noqa: SIM118 (not a mapping)
                tensor = stream.get_slice(disk_name)
                name = disk_name
                for pattern, prefix in _TOWER_PREFIXES:
                    name = pattern.sub(prefix, name)
                if _OTHER_TOWERS.match(name):
                    continue
                dtype = tensor.get_dtype()
                if dtype not in DTYPES:
                    raise InputError(
                        f"tensor '{name}' has a dtype that lfmc does not quantize from",
                        where=file,
                        expected=", ".join(DTYPES),
                        got=dtype,
                    )
                shape = tuple(tensor.get_shape())
                tensors[name] = TensorInfo(name, shape, dtype, file, disk_name)
    except (SafetensorError, OSError) as error:
        raise InputError(
            "a weight file is truncated or corrupted",
            where=file,
            got=error,
            todo="download it again",
        ) from error
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """Return a tensor as stored, unchecked. The file is memory-mapped and read lazily."""
    try:
        with safe_open(info.file, "pt") as stream:
            tensor: Tensor = stream.get_tensor(info.disk_name)
    except (SafetensorError, OSError) as error:
        raise InputError("a weight file can't be read", where=info.file, got=error) from error
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raise `InputError` if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, 5000 digits
        raise InputError(f"{path.name} can't be read", where=path, got=error) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not a JSON object", where=path)
    return value
