from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.grid_search import GRIDS, quantize, row_errors

WIDTHS = st.integers(2, 8)


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, number_format: Format, importance: Tensor | None, grid: str) -> float:
    squared_error = (
        quantize(weight, number_format, importance, grid).dequantize() - weight
    ).square()
    return float((squared_error if importance is None else squared_error * importance).sum())


@settings(deadline=None)
@given(WIDTHS, st.integers(1, 40), st.booleans(), st.integers(1, 70), st.integers(0, 99))
def test_a_search_is_never_worse_than_minmax(
    bits: int, group: int, symmetric: bool, columns: int, seed: int
) -> None:
    number_format = Format(bits, group, symmetric, "float16")
    weight = random(3, columns, seed)
    importance = random(1, columns, seed + 1)[0].square()
    minmax, clip, signed = (error(weight, number_format, importance, grid) for grid in GRIDS)
    assert clip <= minmax * (1 + 1e-5) + 1e-9
    assert signed <= minmax * (1 + 1e-5) + 1e-9


@settings(deadline=None)
@given(WIDTHS, st.booleans(), st.sampled_from(GRIDS), st.integers(0, 99))
def test_codes_are_the_nearest_to_the_rounded_scale(
    bits: int, symmetric: bool, grid: str, seed: int
) -> None:
    number_format = Format(bits, 16, symmetric, "bfloat16")
    weight = random(4, 48, seed)
    packed = quantize(weight, number_format, None, grid)
    zeros: Tensor | int = number_format.zero_point
    if packed.zeros is not None:
        zeros = packed.zeros.unsqueeze(-1).float()
    levels = torch.arange(2**bits).view(-1, 1, 1)
    values = (levels - zeros) if isinstance(zeros, int) else levels - zeros.squeeze(-1)
    values = values * packed.scales.float()  # (levels, N, G)
    distance = (weight.view(4, 3, 16, 1) - values.permute(1, 2, 0).unsqueeze(2)).abs()
    best = distance.amin(-1).view(4, 48)
    assert torch.allclose((packed.dequantize() - weight).abs(), best, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_degenerate_groups_are_exact_or_finite(
    grid: str, symmetric: bool, bits: int, scale_dtype: str
) -> None:
    number_format = Format(bits, 8, symmetric, scale_dtype)
    exact = {
        "zeros": torch.zeros(2, 16),
        "one value": torch.full((2, 16), 0.375),
        "one negative value": torch.full((2, 16), -3.0),
        "one value a row": torch.tensor([[1.0], [-0.5], [0.0]]).expand(3, 16),
        "zeros and one value": torch.tensor([[0.0, 1.5] * 8]),
    }
    for case, weight in exact.items():
        assert torch.equal(quantize(weight, number_format, None, grid).dequantize(), weight), case
    finite = {
        "huge": torch.tensor([[1e30, -1e30] * 8]),
        "tiny": torch.tensor([[1e-30, -1e-30] * 8]),
        "rank one": random(4, 1) @ random(1, 16),
    }
    for case, weight in finite.items():
        assert torch.isfinite(quantize(weight, number_format, None, grid).dequantize()).all(), case


def test_a_channel_that_does_not_matter_may_be_clipped() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.3, -0.4, 0.2, -0.1, 0.4, 9.0]])
    importance = torch.tensor([1.0] * 7 + [0.0])
    number_format = Format(4, 8, False, "float16")
    dequantized = quantize(weight, number_format, importance, "clip").dequantize()
    assert (dequantized - weight)[:, :7].abs().max() < 0.3
    assert error(weight, number_format, importance, "clip") < 0.5 * error(
        weight, number_format, importance, "minmax"
    )


def test_chunking_does_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, number_format = random(9, 40), Format(3, 16, True, "float16")
    unchunked = quantize(weight, number_format, None, "signed")
    monkeypatch.setattr("lfmc.calib_free.grid.grid_search.CHUNK", 1)
    chunked = quantize(weight, number_format, None, "signed")
    assert torch.equal(unchunked.codes, chunked.codes)
    assert torch.equal(unchunked.scales, chunked.scales)


def test_row_errors_are_those_of_the_codes() -> None:
    weight, number_format = random(5, 40), Format(3, 16, False, "float16")
    expected = (quantize(weight, number_format, None, "clip").dequantize() - weight).square().sum(1)
    errors = row_errors(weight, torch.ones_like(weight), number_format, "clip")
    torch.testing.assert_close(errors, expected)


def test_wrong_arguments_are_refused() -> None:
    number_format = Format(4, 8, True, "float16")
    with pytest.raises(ValueError, match="unknown grid 'best'"):
        quantize(random(1, 8), number_format, None, "best")
    with pytest.raises(ValueError, match="importance has shape"):
        quantize(random(1, 8), number_format, torch.ones(3), "clip")
