from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfmc.calib_free import spectra
from lfmc.calib_free.spectra import hill, pl_alpha_hill
from lfmc.checkpoint import Checkpoint
from lfmc.errors import InputError


def naive(weight: Tensor, block: int = 128) -> float:
    """The paper, block by block, with an SVD each."""
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
def test_it_is_the_naive_estimator(rows: int, columns: int, block: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    assert pl_alpha_hill(weight, block) == pytest.approx(naive(weight, block), rel=1e-6)


def test_trained_matrices(demo: Checkpoint) -> None:
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


def test_degenerate_matrices_have_an_answer() -> None:
    assert pl_alpha_hill(torch.zeros(32, 32)) == math.inf
    assert pl_alpha_hill(torch.eye(32)) == math.inf
    rank_one = torch.ones(32, 1) @ torch.ones(1, 32)
    assert 1 < pl_alpha_hill(rank_one) < 2


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (64,)])
def test_a_spectrum_needs_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="needs a matrix"):
        pl_alpha_hill(torch.ones(shape))


def test_a_power_law_gives_its_own_tail() -> None:
    ranks = torch.arange(1, 1001, dtype=torch.float64)
    tail = hill(ranks ** (-1 / 1.5))  # rank ~ x^(1 - alpha) with alpha 2.5
    assert tail.length == 100
    assert tail.edge == pytest.approx(101 ** (-1 / 1.5))
    assert tail.alpha == pytest.approx(2.5, rel=0.05)
    assert hill(torch.ones(50, dtype=torch.float64)).alpha == math.inf
    assert hill(torch.zeros(50, dtype=torch.float64)).alpha == math.inf
