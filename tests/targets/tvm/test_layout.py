"""The layout of n-bit matrices in a parameters file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.errors import InputError
from lfmc.targets.shared.parameters_file import PARAMETERS, Parameter, open_parameters, write
from lfmc.targets.tvm.kernels.layout import (
    pack_codes,
    pack_groups,
    pack_zeros,
    unpack_codes,
    unpack_groups,
    unpack_zeros,
)

BITS = st.sampled_from([2, 3, 4, 6, 8])
SIZES = st.integers(1, 50)


@given(BITS, SIZES, st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_codes_round_trip_without_padding(bits: int, rows: int, chunks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 32 * chunks)
    codes = torch.randint(1 << bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.numel() == rows * shape[1] * bits // 8
    assert torch.equal(unpack_codes(packed, bits, *shape), codes)


@given(BITS, SIZES, st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_zero_points_and_scales_round_trip(bits: int, rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    packed = pack_zeros(zeros, bits)
    assert packed.numel() == -(-rows * groups * bits // 8)
    assert torch.equal(unpack_zeros(packed, bits, rows, groups), zeros)
    assert torch.equal(unpack_groups(pack_groups(zeros), rows, groups), zeros)


def test_four_columns_of_sixteen_rows_are_a_vector() -> None:
    """Spell out the layout that kernels, and hosts in other languages, rely on."""
    codes = torch.arange(16 * 32, dtype=torch.uint8).view(16, 32) & 0xF
    packed = pack_codes(codes, 4).view(4, 16, 4)  # vectors, rows, bytes
    for vector in range(4):
        low, high = codes[:, 8 * vector :][:, :4], codes[:, 8 * vector + 4 :][:, :4]
        assert torch.equal(packed[vector], low | (high << 4))


def _write_parameters(folder: Path) -> dict[str, torch.Tensor]:
    values = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "even": torch.arange(64, dtype=torch.float32).view(8, 8),
        "half": torch.arange(32).to(torch.bfloat16),
    }
    kinds = {"odd": "uint8", "even": "float32", "half": "bfloat16"}
    parameters = [Parameter(n, kinds[n], tuple(v.shape), v.clone) for n, v in values.items()]
    write(folder / PARAMETERS, parameters, {"chunk": 3})
    return values


def test_parameters_are_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    values = _write_parameters(tmp_path)
    tensors = load_file(tmp_path / PARAMETERS)
    parameters = open_parameters(tmp_path)
    assert parameters.facts == {"chunk": 3}
    assert {*tensors} == {*values}
    for name, value in values.items():
        assert torch.equal(tensors[name], value)
        assert torch.equal(parameters.tensor(name), value)
    assert parameters.tensor("even").data_ptr() % 64 == 0
    assert parameters.tensor("half").data_ptr() % 64 == 0


def test_a_tensor_of_the_wrong_size_is_not_written(tmp_path: Path) -> None:
    wrong = Parameter("w", "float32", (3,), lambda: torch.zeros(4))
    with pytest.raises(ValueError, match="does not have its declared size"):
        write(tmp_path / PARAMETERS, [wrong], {})


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:40], lambda _: b""])
def test_a_damaged_file_raises_an_input_error(tmp_path: Path, spoil: object) -> None:
    with pytest.raises(InputError, match="there is no parameters file"):
        open_parameters(tmp_path)
    _write_parameters(tmp_path)
    path = tmp_path / PARAMETERS
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"not complete|can't be read"):
        open_parameters(tmp_path)
