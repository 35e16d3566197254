"""Arrays in files: memory that the system can drop and read again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

MIN_NBYTES = 1 << 16  # smaller arrays stay in memory


def map_tensor(tensor: Tensor, folder: Path) -> Tensor:
    """Write a tensor to a file in `folder`, and return it as memory-mapped from there.

    The file has no name any more when the function returns, where the system allows it, so its
    bytes are freed with the tensor. Otherwise the caller removes the folder.
    """
    if tensor.nbytes < MIN_NBYTES:
        return tensor
    path = folder / uuid4().hex
    raw = tensor.contiguous().flatten().view(torch.uint8)
    raw.numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=raw.numel(), dtype=torch.uint8)
    with suppress(OSError):  # of a system that can't remove a mapped file
        path.unlink()
    return mapped.view(tensor.dtype).view(tensor.shape)


def map_array(array: np.ndarray, folder: Path) -> np.ndarray:
    """Do the same for an array of numpy; the metadata of its dtype stays."""
    if array.nbytes < MIN_NBYTES:
        return array
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    mapped = map_tensor(torch.from_numpy(raw), folder).numpy()
    return mapped.view(array.dtype).reshape(array.shape)
