"""The layout of n-bit matrices, and the arithmetic that unpacks them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.targets.mlir.arithmetic import (
    Arithmetic,
    FloatArithmetic,
    ShiftArithmetic,
    WordArithmetic,
)
from lfmc.targets.mlir.layout import (
    EIGHTHS,
    fields,
    pack_codes,
    pack_groups,
    pack_zeros,
    unpack_codes,
    unpack_groups,
    unpack_zeros,
)
from lfmc.targets.shared.parameters_file import DTYPES, Parameter

BITS = st.sampled_from([2, 3, 4, 6, 8])
ARITHMETICS: dict[str, Arithmetic] = {
    "shifts": ShiftArithmetic(slices=True),
    "shifts, no slices": ShiftArithmetic(slices=False),
    "floats": FloatArithmetic("uint8"),
    "signed floats": FloatArithmetic("int8"),
    "words": WordArithmetic(),
}


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(1 << bits, shape, generator=generator, dtype=torch.uint8)


def as_argument(arithmetic: Arithmetic, value: torch.Tensor) -> torch.Tensor:
    """View the bytes of a parameter as the argument that functions take."""
    dtype = str(value.dtype).removeprefix("torch.")
    argument = arithmetic.as_argument(Parameter("p", dtype, tuple(value.shape), lambda: value))
    return value.flatten().view(DTYPES[argument.dtype][1]).view(argument.shape)


@given(BITS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64, 128]))
@settings(max_examples=40, deadline=None)
def test_codes_round_trip_without_padding(bits: int, blocks: int, groups: int, group: int) -> None:
    codes = random_codes(bits, 16 * blocks, groups * group)
    packed = pack_codes(codes, bits, group)
    assert packed.shape == (blocks, groups, bits, group // 8, 16)
    assert torch.equal(unpack_codes(packed, bits), codes)


@given(BITS, st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_zero_points_and_scales_round_trip(bits: int, blocks: int, groups: int) -> None:
    zeros = random_codes(bits, 16 * blocks, groups)
    packed = pack_zeros(zeros, bits)
    assert packed.numel() == 16 * blocks * groups * bits // 8
    assert torch.equal(unpack_zeros(packed, bits), zeros)
    assert torch.equal(unpack_groups(pack_groups(zeros)), zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_bit_of_a_unit_belongs_to_one_code(bits: int) -> None:
    used = [
        (field.unit, field.shift + bit)
        for eighth in range(EIGHTHS)
        for field in fields(bits, eighth)
        for bit in range(field.width)
    ]
    assert sorted(used) == [(unit, bit) for unit in range(bits) for bit in range(8)]


@pytest.mark.parametrize("name", ARITHMETICS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_are_unpacked(name: str, bits: int) -> None:
    arithmetic, codes = ARITHMETICS[name], random_codes(bits, 32, 64)
    packed = pack_codes(codes, bits, 32)
    units = as_argument(arithmetic, packed)
    unpacked = arithmetic.unpack(units, bits)  # (2, 2, 8, 4, 16)
    assert torch.equal(unpacked.permute(0, 4, 1, 2, 3).reshape(32, 64), codes.float())
    for eighth in range(EIGHTHS):
        assert torch.equal(arithmetic.unpack_eighth(units, bits, eighth), unpacked[:, :, eighth])


@pytest.mark.parametrize("name", ARITHMETICS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_zero_points_are_unpacked(name: str, bits: int) -> None:
    arithmetic, zeros = ARITHMETICS[name], random_codes(bits, 32, 3)
    packed = pack_zeros(zeros, bits)
    result = arithmetic.prepare_zeros(as_argument(arithmetic, packed), bits, tuple(packed.shape))
    assert result.dtype == DTYPES[arithmetic.dtype][1]
    assert torch.equal(arithmetic.widen_zeros(result), pack_groups(zeros).float())


@pytest.mark.parametrize("name", ARITHMETICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_converted_to_float32(name: str, dtype: torch.dtype) -> None:
    """Every finite value, including subnormals and both zeros."""
    all_values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = all_values[all_values.isfinite()]
    value = finite[: len(finite) // 2 * 2]
    kind = str(dtype).removeprefix("torch.")
    result = ARITHMETICS[name].widen_halves(
        as_argument(ARITHMETICS[name], value), kind, lambda _, make: make()
    )
    assert torch.equal(result, value.float())


@pytest.mark.parametrize("name", ARITHMETICS)
def test_lanes_are_selected(name: str) -> None:
    rows, lane = torch.rand(5, 7, 16), torch.tensor([0, 15, 3, 3, 8], dtype=torch.int32)
    expected = torch.stack([rows[row, :, column] for row, column in enumerate(lane.tolist())])
    assert torch.equal(ARITHMETICS[name].select_lane(rows, lane), expected)


@pytest.mark.parametrize("name", ARITHMETICS)
def test_rows_are_located_and_caches_written(name: str) -> None:
    arithmetic = ARITHMETICS[name]
    rows = torch.arange(0, 70, 3, dtype=torch.int32)
    block, lane = arithmetic.block_and_lane(rows)
    assert torch.equal(16 * block + lane, rows)
    assert int(lane.max()) < 16
    cache, start = torch.zeros(2, 9, 3), torch.tensor([4], dtype=torch.int32)
    for count in (1, 3):
        new = torch.rand(2, count, 3)
        written = arithmetic.put(cache, new, start, 1)
        assert torch.equal(written[:, 4 : 4 + count], new)
        assert not written[:, :4].any()
        assert not written[:, 4 + count :].any()
