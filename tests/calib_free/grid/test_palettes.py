"""Palettes: tables of values, and codes that index them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.calib_free.fit.fake_quant import FakePalette
from lfmc.calib_free.grid.formats import Format, parse_format
from lfmc.calib_free.grid.grid_search import PALETTE, quantize, row_errors
from lfmc.calib_free.grid.packed_tensor import split_rows, stack_rows
from lfmc.calib_free.plan.fitted_tensors import packed_from_parts, tensor_parts
from lfmc.errors import InputError
from lfmc.graph.ops import dequantize


def palette(bits: int) -> Format:
    return Format(bits, 0, True, "float16")


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(1, 9))
def test_palettes_have_a_name_and_a_size(bits: int) -> None:
    number_format = palette(bits)
    assert number_format.name == f"lut{bits}-float16"
    assert parse_format(number_format.name) == number_format
    assert number_format.nbytes((3, 20)) == 3 * (-(-20 * bits // 8) + 2 * 2**bits)
    with pytest.raises(InputError, match="no such number format"):
        Format(bits, 0, False, "float16")  # a table needs no zero points


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 70),
    st.floats(1e-6, 1e4),
    st.integers(0, 99),
)
def test_every_code_is_the_nearest_of_its_row(
    bits: int, rows: int, columns: int, size: float, seed: int
) -> None:
    weight = random(rows, columns, seed) * size
    packed = quantize(weight, palette(bits), None, PALETTE)
    assert packed.codes.shape == (rows, columns)
    assert packed.scales.shape == (rows, 2**bits)
    weights = packed.dequantize()
    best = (weight[:, :, None] - packed.scales.float()[:, None]).abs().amin(-1)
    assert torch.allclose((weights - weight).abs(), best, rtol=1e-5, atol=1e-7 * size)
    stream = packed.packed_codes()
    assert stream.nbytes + packed.scales.nbytes == palette(bits).nbytes((rows, columns))
    streamed = dequantize(stream, packed.scales, None, bits, 0, columns)
    assert torch.equal(streamed, weights)
    assert torch.equal(
        packed_from_parts(tensor_parts(packed), palette(bits), (rows, columns)).codes, packed.codes
    )


def test_as_many_values_as_a_table_has_are_exact() -> None:
    values = torch.tensor([-3.0, -0.5, 0.0, 8.0])
    weight = values[torch.randint(4, (6, 50), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(quantize(weight, palette(2), None, PALETTE).dequantize(), weight)
    for row in (torch.zeros(1, 9), torch.full((1, 9), 2.5)):
        assert torch.equal(quantize(row, palette(3), None, PALETTE).dequantize(), row)


def test_a_table_beats_a_grid_over_the_row_and_nears_the_optimum() -> None:
    weight = random(64, 1024)
    errors = {}
    for bits in (2, 3):
        table = quantize(weight, palette(bits), None, PALETTE)
        grid = quantize(weight, Format(bits, 1024, False, "float16"), None, "clip")
        errors[bits] = float((table.dequantize() - weight).square().mean())
        assert errors[bits] < float((grid.dequantize() - weight).square().mean())
    # Max 1960: 0.1175 and 0.03454 for a normal distribution of variance 1.
    assert errors[2] == pytest.approx(0.1175, rel=0.03)
    assert errors[3] == pytest.approx(0.03454, rel=0.05)


def test_importance_weighs_the_columns() -> None:
    weight, importance = random(16, 256), torch.ones(256)
    importance[:32] = 100.0
    unweighted = quantize(weight, palette(2), None, PALETTE).dequantize()
    weighted = quantize(weight, palette(2), importance, PALETTE).dequantize()
    column_errors = [
        (dequantized - weight)[:, :32].square().sum() for dequantized in (unweighted, weighted)
    ]
    assert column_errors[1] < 0.9 * column_errors[0]
    cost = importance.expand(16, -1)
    errors = row_errors(weight, cost, palette(2), PALETTE)
    assert torch.allclose(errors, ((weighted - weight).square() * cost).sum(1), rtol=1e-5)


def test_rows_stack_and_split() -> None:
    pieces = [quantize(random(n, 24, n), palette(3), None, PALETTE) for n in (2, 5)]
    stacked = stack_rows(pieces)
    assert torch.equal(stacked.dequantize(), torch.cat([p.dequantize() for p in pieces]))
    for piece, split in zip(pieces, split_rows(stacked, (2, 5)), strict=True):
        assert torch.equal(piece.dequantize(), split.dequantize())


def test_training_changes_tables_and_keeps_codes() -> None:
    weight = random(4, 64)
    packed = quantize(weight, palette(2), None, PALETTE)
    module = FakePalette(packed)
    assert torch.equal(module(), packed.dequantize())
    module().square().sum().backward()
    assert module.shift.grad is not None
    assert bool((module.shift.grad != 0).any())
    with torch.no_grad():
        module.shift += 0.25
    trained = module.packed()
    assert torch.equal(trained.codes, packed.codes)
    assert torch.equal(trained.dequantize(), module().detach())
    assert not torch.equal(trained.scales, packed.scales)


def test_other_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown grid 'clip', expected one of kmeans"):
        quantize(random(2, 8), palette(2), None, "clip")
    with pytest.raises(ValueError, match="unknown grid 'kmeans'"):
        quantize(random(2, 8), Format(2, 8, True, "float16"), None, PALETTE)
