from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfmc.calib_free.alphaq import spectra
from lfmc.calib_free.alphaq.spectra import pl_alpha_hill, spectrum
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError, UnsupportedError


def naive(weight: Tensor, block: int = 128) -> float:
    """Return the exponent of the paper, with one SVD per block."""
    rows, columns = weight.shape
    blocks = [
        weight[i : i + block, j : j + block]
        for i in range(0, rows - block + 1, block)
        for j in range(0, columns - block + 1, block)
    ]
    if rows < block or columns < block:
        blocks = [weight]
    values = np.concatenate([np.linalg.svd(b.double().numpy(), compute_uv=False) for b in blocks])
    spectrum = np.sort(values**2)[::-1]
    k = min(max(10, len(spectrum) // 10), len(spectrum) - 1)
    return float(1 + k / np.log(spectrum[:k] / spectrum[k]).sum())


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 90), st.integers(2, 90), st.sampled_from([8, 32, 128]), st.integers(0, 9))
def test_the_exponent_equals_the_naive_estimator(
    rows: int, columns: int, block: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    assert pl_alpha_hill(weight, block) == pytest.approx(naive(weight, block), rel=1e-6)


def test_trained_matrices_have_typical_exponents(demo: Checkpoint) -> None:
    for name in (
        "model.layers.1.feed_forward.experts.0.w1.weight",
        "model.layers.1.feed_forward.experts.0.w2.weight",
        "model.layers.0.conv.in_proj.weight",
    ):
        weight = demo.load(name)
        assert pl_alpha_hill(weight) == pytest.approx(naive(weight), rel=1e-6)
        assert 2 < pl_alpha_hill(weight) < 8


def test_a_heavier_tail_has_a_smaller_exponent() -> None:
    basis, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    ranks = torch.arange(1, 65).float()
    heavy, light = (basis * ranks**-1.0) @ basis.T, (basis * ranks**-0.25) @ basis.T
    assert pl_alpha_hill(heavy) < pl_alpha_hill(light)


def test_many_blocks_are_sampled_the_same_way_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "MAX_BLOCKS", 4)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert pl_alpha_hill(weight, 8) == pl_alpha_hill(weight, 8)
    assert pl_alpha_hill(weight, 8) != pytest.approx(naive(weight, 8), rel=1e-6)


@pytest.mark.parametrize("size", [2, 32, 640])
def test_degenerate_matrices_have_an_exponent(size: int) -> None:
    assert pl_alpha_hill(torch.zeros(size, size)) == math.inf
    assert pl_alpha_hill(torch.eye(size)) == math.inf
    column = torch.arange(1, size + 1).float()[:, None]
    for rank_one in (torch.ones(size, size), column @ column.T):
        assert 1 < pl_alpha_hill(rank_one) < 2


@pytest.mark.parametrize("size", [4, 40, 640])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_exponent_has_no_unit(size: int, scale: float) -> None:
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    alpha = pl_alpha_hill(weight)
    assert pl_alpha_hill(weight * scale) == pytest.approx(alpha, rel=1e-4)
    assert pl_alpha_hill(weight.double() * scale**9) == pytest.approx(alpha, rel=1e-4)


def test_the_smallest_matrix_has_an_exponent() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert pl_alpha_hill(weight) == pytest.approx(1 + 1 / math.log(9))


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (64,)])
def test_a_spectrum_needs_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="needs a matrix"):
        pl_alpha_hill(torch.ones(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(8, 8, dtype=dtype)
    weight[3, 4] = value
    with pytest.raises(InputError, match="finite"):
        pl_alpha_hill(weight)


@pytest.mark.parametrize("options", [{"block": 1}, {"tail": 0.0}, {"tail": 1.0}, {"tail": -1.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        pl_alpha_hill(torch.ones(8, 8), **options)  # type: ignore[arg-type]


def test_a_spectrum_reports_where_its_tail_begins() -> None:
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).double() * 1e6
    result = spectrum(weight, 16)
    assert result.values.shape == (6 * 16,)
    assert bool((result.values.diff() <= 0).all())
    blocks = [weight[i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16, 32)]
    energy = sum(float(block.square().sum()) for block in blocks)
    assert float(result.values.sum()) == pytest.approx(energy)
    assert (result.tail, result.edge) == (10, float(result.values[10]))
    assert result.alpha == pytest.approx(naive(weight, 16))
    assert spectrum(weight, 16, tail=0.5).tail == 48


def test_another_device_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no such device"):
        pl_alpha_hill(torch.ones(8, 8), device="abacus")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="run it on a machine with a CUDA device")
def test_a_gpu_agrees_with_the_cpu() -> None:
    weight = torch.randn(1792, 2048, generator=torch.Generator().manual_seed(0))
    assert pl_alpha_hill(weight, device="cuda") == pytest.approx(pl_alpha_hill(weight), abs=1e-3)
