"""Fitted tensors: stored exactly, because they can't be recomputed from the checkpoint.

A plan stores the SHA-256 of the parts of each fitted tensor. The parts may come from memory, from a
folder next to the plan, or from an artifact; they are compared with the hash before use.
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

# A stored tensor: bit streams `codes` with `scales` and optional `zeros`, or float `values`.
Parts = Mapping[str, Tensor]
PARTS = ("codes", "scales", "zeros", "values")


def tensor_parts(packed: PackedTensor) -> dict[str, Tensor]:
    """Return codes and zero points as bit streams, and scales."""
    zeros = packed.packed_zeros()
    parts = {"codes": packed.packed_codes(), "scales": packed.scales}
    return parts if zeros is None else {**parts, "zeros": zeros}


def packed_from_parts(parts: Parts, number_format: Format, shape: tuple[int, int]) -> PackedTensor:
    """Invert `tensor_parts`; raises `ValueError` if the parts do not match format and shape."""
    groups, bits = number_format.groups_per_row(shape[1]), number_format.bits
    zeros = parts.get("zeros")
    if (zeros is None) != number_format.symmetric or parts["scales"].shape != (shape[0], groups):
        raise ValueError(f"the parts are not those of {number_format.name} {list(shape)}")
    return PackedTensor(
        number_format,
        shape,
        unpack_bits(parts["codes"], bits, number_format.codes_per_row(shape[1])),
        parts["scales"],
        None if zeros is None else unpack_bits(zeros, bits, groups),
    )


def digest_parts(parts: Parts) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of the parts."""
    sha256 = hashlib.sha256()
    for name in sorted(parts):
        value = parts[name].contiguous()
        sha256.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        sha256.update(value.view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def save_fitted(file: Path, fitted: Mapping[str, Parts]) -> None:
    """Write fitted tensors into one safetensors file, in a folder that `FittedFolder` reads."""
    flat = {
        f"{name}.{part}": value for name, parts in fitted.items() for part, value in parts.items()
    }
    save_file({key: value.contiguous() for key, value in flat.items()}, file)


class FittedFolder(Mapping[str, Parts]):
    """The tensors in the safetensors files of a folder, read on access.

    Raises `InputError` if the folder is missing or a file can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, dict[str, Path]] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise InputError(
                "the plan's fitted tensors are missing",
                where=folder,
                expected="safetensors files, written with the plan",
                todo="keep the folder next to its plan.json, or make the plan again",
            )
        for path in paths:
            with _open(path) as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    name, _, part = key.rpartition(".")
                    self._files.setdefault(name, {})[part] = path

    def __getitem__(self, name: str) -> Parts:
        parts = {}
        for part, path in self._files[name].items():
            with _open(path) as tensors:
                parts[part] = tensors.get_tensor(f"{name}.{part}")
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
