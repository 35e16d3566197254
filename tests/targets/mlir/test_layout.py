"""The order in which n-bit matrices lie, and the arithmetic that takes them apart again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.targets.mlir.arithmetic import ByFloats, ByShifts, ByWords, Dialect
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
DIALECTS: dict[str, Dialect] = {
    "shifts": ByShifts(slices=True),
    "shifts, no slices": ByShifts(slices=False),
    "floats": ByFloats("uint8"),
    "signed floats": ByFloats("int8"),
    "words": ByWords(),
}


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(1 << bits, shape, generator=generator, dtype=torch.uint8)


def as_given(dialect: Dialect, value: torch.Tensor) -> torch.Tensor:
    """A parameter of the file as functions take it: the same bytes."""
    dtype = str(value.dtype).removeprefix("torch.")
    own = dialect.as_given(Parameter("p", dtype, tuple(value.shape), lambda: value))
    return value.flatten().view(DTYPES[own.dtype][1]).view(own.shape)


@given(BITS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64, 128]))
@settings(max_examples=40, deadline=None)
def test_codes_come_back_and_no_byte_is_padding(
    bits: int, blocks: int, groups: int, group: int
) -> None:
    codes = random_codes(bits, 16 * blocks, groups * group)
    packed = pack_codes(codes, bits, group)
    assert packed.shape == (blocks, groups, bits, group // 8, 16)
    assert torch.equal(unpack_codes(packed, bits), codes)


@given(BITS, st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_zero_points_and_scales_come_back(bits: int, blocks: int, groups: int) -> None:
    zeros = random_codes(bits, 16 * blocks, groups)
    packed = pack_zeros(zeros, bits)
    assert packed.numel() == 16 * blocks * groups * bits // 8
    assert torch.equal(unpack_zeros(packed, bits), zeros)
    assert torch.equal(unpack_groups(pack_groups(zeros)), zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_bit_of_a_unit_belongs_to_one_code(bits: int) -> None:
    found = [
        (own.unit, own.shift + bit)
        for eighth in range(EIGHTHS)
        for own in fields(bits, eighth)
        for bit in range(own.width)
    ]
    assert sorted(found) == [(unit, bit) for unit in range(bits) for bit in range(8)]


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_dialect_takes_codes_apart(name: str, bits: int) -> None:
    dialect, codes = DIALECTS[name], random_codes(bits, 32, 64)
    packed = pack_codes(codes, bits, 32)
    units = as_given(dialect, packed)
    together = dialect.spread(units, bits)  # (2, 2, 8, 4, 16)
    assert torch.equal(together.permute(0, 4, 1, 2, 3).reshape(32, 64), codes.float())
    for eighth in range(EIGHTHS):
        assert torch.equal(dialect.eighth(units, bits, eighth), together[:, :, eighth])


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_zero_points_are_prepared(name: str, bits: int) -> None:
    dialect, zeros = DIALECTS[name], random_codes(bits, 32, 3)
    packed = pack_zeros(zeros, bits)
    made = dialect.zeros(as_given(dialect, packed), bits, tuple(packed.shape))
    assert made.dtype == DTYPES[dialect.dtype][1]
    assert torch.equal(dialect.number(made), pack_groups(zeros).float())


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened(name: str, dtype: torch.dtype) -> None:
    """Every finite one, subnormal ones and both zeros, too."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    value = finite[: len(finite) // 2 * 2]
    kind = str(dtype).removeprefix("torch.")
    made = DIALECTS[name].halves(as_given(DIALECTS[name], value), kind, lambda _, make: make())
    assert torch.equal(made, value.float())


@pytest.mark.parametrize("name", DIALECTS)
def test_lanes_are_picked(name: str) -> None:
    rows, lane = torch.rand(5, 7, 16), torch.tensor([0, 15, 3, 3, 8], dtype=torch.int32)
    expected = torch.stack([rows[at, :, own] for at, own in enumerate(lane.tolist())])
    assert torch.equal(DIALECTS[name].pick(rows, lane), expected)


@pytest.mark.parametrize("name", DIALECTS)
def test_rows_and_caches(name: str) -> None:
    dialect = DIALECTS[name]
    rows = torch.arange(0, 70, 3, dtype=torch.int32)
    block, lane = dialect.block_and_lane(rows)
    assert torch.equal(16 * block + lane, rows)
    assert int(lane.max()) < 16
    cache, start = torch.zeros(2, 9, 3), torch.tensor([4], dtype=torch.int32)
    for count in (1, 3):
        new = torch.rand(2, count, 3)
        written = dialect.put(cache, new, start, 1)
        assert torch.equal(written[:, 4 : 4 + count], new)
        assert not written[:, :4].any()
        assert not written[:, 4 + count :].any()
