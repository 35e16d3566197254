"""Tensors and arrays that move from memory to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lfmc.machine.mapped import MIN_NBYTES, map_array, map_tensor


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32])
def test_a_mapped_tensor_has_the_same_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(MIN_NBYTES).view(256, -1).to(dtype).T
    mapped = map_tensor(tensor, tmp_path)
    assert mapped.dtype == dtype
    assert torch.equal(mapped, tensor)
    assert mapped.data_ptr() != tensor.data_ptr()


def test_a_small_tensor_stays_in_memory(tmp_path: Path) -> None:
    tensor = torch.zeros(MIN_NBYTES - 1, dtype=torch.uint8)
    assert map_tensor(tensor, tmp_path) is tensor


def test_a_mapped_array_keeps_the_metadata_of_its_dtype(tmp_path: Path) -> None:
    dtype = np.dtype(np.int8, metadata={"true_dtype": "int4"})
    array = np.arange(MIN_NBYTES).astype(dtype).reshape(2, -1)
    mapped = map_array(array, tmp_path)
    assert mapped.dtype.metadata == dtype.metadata
    np.testing.assert_array_equal(mapped, array)
