"""Files of weights: which a folder has, what their headers say, and one tensor at a time.

Tensor names are those on disk; a vision-language checkpoint's language tower is read under the
names that it has on its own (`model.layers.0...`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lfmc.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_TOWER_PREFIXES = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)
_OTHER_TOWERS = re.compile(r"^(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, without its data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    disk_name: str

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made whenever it is asked for: nothing is kept."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weight_files(path: Path) -> list[Path]:
    """The files in folder `path` that hold its weights.

    Raises `InputError` where there are none, where they are pickles, and for an index that names
    files which are not there.
    """
    index = path / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError("the weight index names no files", where=index, expected="weight_map")
        found = sorted(set(map(str, names.values())))
        for name in found:
            if Path(name).name != name or "\\" in name:
                raise InputError(
                    "the weight index points outside its folder",
                    where=index,
                    expected="plain file names",
                    got=repr(name),
                )
            if not (path / name).is_file():
                raise InputError("a weight file is missing", where=path / name)
        return [path / name for name in found]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise InputError(
            "the weights are Python pickles, which lfmc never loads: they can run code",
            where=path,
            expected=f"{SINGLE} or {INDEX}",
            got=", ".join(pickles),
            todo="convert them with safetensors where they are trusted",
        )
    raise InputError("the folder has no weights", where=path, expected=f"{SINGLE} or {INDEX}")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The decoder's tensors in a weight file, by name.

    Raises `InputError` for a file that can't be read, or a dtype that lfmc does not quantize from.
    """
    found = {}
    try:
        with safe_open(file, "pt") as stream:
            for disk_name in stream.keys():  # noqa: SIM118 (not a mapping)
                piece = stream.get_slice(disk_name)
                name = disk_name
                for pattern, plain in _TOWER_PREFIXES:
                    name = pattern.sub(plain, name)
                if _OTHER_TOWERS.match(name):
                    continue
                dtype = DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise InputError(
                        f"tensor '{name}' has a dtype that lfmc does not quantize from",
                        where=file,
                        expected=", ".join(DTYPES),
                        got=piece.get_dtype(),
                    )
                shape = tuple(piece.get_shape())
                found[name] = TensorInfo(name, shape, dtype, file, disk_name)
    except (SafetensorError, OSError) as error:
        raise InputError(
            "a weight file is truncated or corrupted",
            where=file,
            got=error,
            todo="download it again",
        ) from error
    return found


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor as it lies on disk, unchecked: its file is mapped, and read where it is touched."""
    try:
        with safe_open(info.file, "pt") as stream:
            tensor: Tensor = stream.get_tensor(info.disk_name)
    except (SafetensorError, OSError) as error:
        raise InputError("a weight file can't be read", where=info.file, got=error) from error
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; raises `InputError` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, 5000 digits
        raise InputError(f"{path.name} can't be read", where=path, got=error) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not a JSON object", where=path)
    return value
