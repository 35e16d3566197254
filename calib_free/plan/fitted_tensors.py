"""Tensors that were fitted: stored exactly, because no rule makes them anew from the checkpoint.

A plan names the SHA-256 of each one's parts; wherever the parts come from (memory, a folder next to
the plan, an artifact), they are compared with it before they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.packed_tensor import PackedTensor, unpack_bits
from lfmc.errors import InputError

# A tensor as it is stored: bit streams `codes`, with `scales` and perhaps `zeros`, or `values`.
Parts = Mapping[str, Tensor]
PARTS = ("codes", "scales", "zeros", "values")


def parts_of(packed: PackedTensor) -> dict[str, Tensor]:
    """Codes and zero points as bit streams, and scales."""
    zeros = packed.packed_zeros()
    parts = {"codes": packed.packed_codes(), "scales": packed.scales}
    return parts if zeros is None else {**parts, "zeros": zeros}


def packed_of(parts: Parts, number_format: Format, shape: tuple[int, int]) -> PackedTensor:
    """The inverse of `parts_of`; `ValueError` where the parts do not fit format and shape."""
    groups, bits = number_format.groups(shape[1]), number_format.bits
    zeros = parts.get("zeros")
    if (zeros is None) != number_format.symmetric or parts["scales"].shape != (shape[0], groups):
        raise ValueError(f"the parts are not those of {number_format.name} {list(shape)}")
    return PackedTensor(
        number_format,
        shape,
        unpack_bits(parts["codes"], bits, number_format.codes(shape[1])),
        parts["scales"],
        None if zeros is None else unpack_bits(zeros, bits, groups),
    )


def digest(parts: Parts) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the parts."""
    found = hashlib.sha256()
    for name in sorted(parts):
        value = parts[name].contiguous()
        found.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        found.update(value.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def save_fitted(file: Path, fitted: Mapping[str, Parts]) -> None:
    """Write tensors into one safetensors file of a folder that `FittedFolder` reads."""
    flat = {f"{name}.{part}": v for name, parts in fitted.items() for part, v in parts.items()}
    save_file({key: value.contiguous() for key, value in flat.items()}, file)


class FittedFolder(Mapping[str, Parts]):
    """Every tensor in the safetensors files of a folder, read when asked for.

    Raises `InputError` where the folder is missing or a file can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, dict[str, Path]] = {}
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise InputError(
                "the plan's fitted tensors are missing",
                where=folder,
                expected="safetensors files, written with the plan",
                todo="keep the folder beside its plan.json, or make the plan again",
            )
        for file in found:
            with _open(file) as stream:
                for key in stream.keys():  # noqa: SIM118 (not a mapping)
                    name, _, part = key.rpartition(".")
                    self._files.setdefault(name, {})[part] = file

    def __getitem__(self, name: str) -> Parts:
        parts = {}
        for part, file in self._files[name].items():
            with _open(file) as stream:
                parts[part] = stream.get_tensor(f"{name}.{part}")
        return parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            "fitted tensors can't be read", where=file, got=error, todo="make the plan again"
        ) from error
