from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfmc.calib_free.grid.formats import GENERIC, ROW, Floats, Format, parse_format
from lfmc.errors import InputError

FORMATS = st.builds(
    Format,
    st.integers(1, 8),
    st.integers(1, 256) | st.just(ROW),
    st.booleans(),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)


@given(FORMATS)
def test_a_name_round_trips(number_format: Format) -> None:
    assert Format.parse(number_format.name) == number_format
    assert parse_format(number_format.name) == number_format


@given(st.sampled_from(["float32", "float16", "bfloat16"]))
def test_float_names_round_trip(dtype: str) -> None:
    assert parse_format(Floats(dtype).name) == Floats(dtype)


@pytest.mark.parametrize("name", ["", "int4", "int4-g32-asym-int8", "int4-g0-sym-float16", "int9"])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        parse_format(name)


@pytest.mark.parametrize(
    ("number_format", "shape", "nbytes"),
    [
        (Format(4, 32, True, "float16"), (2, 64), 2 * (32 + 2 * 2)),
        (Format(4, 32, False, "float16"), (2, 64), 2 * (32 + 2 * 2 + 1)),
        (Format(3, 32, False, "float32"), (1, 33), 24 + 2 * 4 + 1),  # a tail fills its group
        (Format(3, 5, True, "bfloat16"), (3, 7), 3 * (4 + 2 * 2)),  # 10 codes, 30 bits, 4 bytes
        (Format(8, 128, True, "float16"), (0, 128), 0),
        (Format(8, ROW, True, "float32"), (2, 33), 2 * (33 + 4)),
        (Format(3, ROW, False, "float16"), (1, 33), 13 + 2 + 1),
    ],
)
def test_bytes_counted_by_hand(number_format: Format, shape: tuple[int, int], nbytes: int) -> None:
    assert number_format.nbytes(shape) == nbytes


def test_bytes_of_floats_count_every_dim() -> None:
    assert Floats("bfloat16").nbytes((4, 1, 3)) == 24


@given(FORMATS, st.integers(1, 9), st.integers(1, 400))
def test_more_bits_never_take_fewer_bytes(number_format: Format, rows: int, columns: int) -> None:
    shape = (rows, columns)
    wider = Format(min(number_format.bits + 1, 8), *_rest(number_format))
    assert wider.nbytes(shape) >= number_format.nbytes(shape)


def _rest(f: Format) -> tuple[int, bool, str]:
    return f.group, f.symmetric, f.scale_dtype


def test_widths_are_sorted() -> None:
    assert GENERIC.bits() == (2, 3, 4, 5, 6, 8)
