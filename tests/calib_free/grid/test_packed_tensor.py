from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfmc.calib_free.grid.formats import ROW, Format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.calib_free.grid.packed_tensor import pack_bits, unpack_bits


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 77), st.integers(0, 2**31))
def test_packing_round_trips(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), generator=generator).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_the_stream_is_little_endian(bits: int, values: list[int]) -> None:
    codes = [v & ((1 << bits) - 1) for v in values]
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    expected = number.to_bytes(-(-len(codes) * bits // 8), "little")
    assert bytes(pack_bits(torch.tensor(codes, dtype=torch.uint8), bits).tolist()) == expected


def test_leading_dims_are_kept() -> None:
    codes = torch.arange(24, dtype=torch.uint8).view(2, 3, 4) % 8
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, 4), codes)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        pack_bits(torch.tensor([4], dtype=torch.uint8), 2)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack_bits(torch.zeros(1, dtype=torch.uint8), bits)


def test_a_stream_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="5 codes of 3 bits do not fill 3 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 5)


@given(
    st.integers(1, 8),
    st.integers(1, 40) | st.just(ROW),
    st.booleans(),
    st.integers(1, 6),
    st.integers(1, 90),
)
def test_stored_parts_have_the_bytes_that_the_format_counts(
    bits: int, group: int, symmetric: bool, rows: int, columns: int
) -> None:
    number_format = Format(bits, group, symmetric, "float16")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, number_format, None, "minmax")
    zeros = packed.packed_zeros()
    parts = [packed.packed_codes(), packed.scales, *([] if zeros is None else [zeros])]
    assert sum(part.numel() * part.element_size() for part in parts) == packed.nbytes


def test_padding_holds_the_zero_point() -> None:
    packed = quantize(torch.full((1, 3), -1.0), Format(4, 4, False, "float16"), None, "minmax")
    assert packed.zeros is not None
    assert packed.codes[0, 3] == packed.zeros[0, 0]
    assert packed.dequantize().shape == (1, 3)
