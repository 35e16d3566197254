"""Exponents from leading eigenvalues alone, compared with those of full spectra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfmc.calib_free.alphaq import ritz, spectra
from lfmc.calib_free.alphaq.spectra import pl_alpha_hill, spectrum

ROWS, COLUMNS = 640, 768  # 30 blocks: enough for the filter


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(seed: int, freedom: int) -> Tensor:
    mean_square = normal(seed + 1, freedom, ROWS, COLUMNS).square().mean(dim=0)
    return normal(seed, ROWS, COLUMNS) / mean_square.sqrt()


def scaled(seed: int, spread: float) -> Tensor:
    """Return blocks of different magnitudes: many have too much, or nothing, of the tail."""
    blocks = (spread * normal(seed + 1, 5, 6)).exp()
    return normal(seed, ROWS, COLUMNS) * blocks.kron(torch.ones(128, 128))


def low_rank(seed: int, rank: int, noise: float) -> Tensor:
    product = normal(seed, ROWS, rank) @ normal(seed + 1, rank, COLUMNS)
    return product + noise * normal(seed + 2, ROWS, COLUMNS)


def dominated(seed: int, size: float) -> Tensor:
    return normal(seed, ROWS, COLUMNS) + size * low_rank(seed + 1, 1, 0.0)


def power_law(seed: int, power: float) -> Tensor:
    left, right = (torch.linalg.qr(normal(seed + n, n, ROWS)).Q for n in (ROWS, COLUMNS))
    return (left * torch.arange(1, ROWS + 1) ** -power) @ right.T


def sparse(seed: int, share: float) -> Tensor:
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) < share
    return normal(seed, ROWS, COLUMNS) * mask


MATRICES = st.one_of(
    st.builds(scaled, st.integers(0, 99), st.sampled_from([0.0, 0.03, 0.1, 0.3, 1.0])),
    st.builds(student, st.integers(0, 99), st.integers(2, 8)),
    st.builds(low_rank, st.integers(0, 99), st.integers(1, 80), st.sampled_from([0.0, 0.1, 3.0])),
    st.builds(dominated, st.integers(0, 99), st.floats(0.01, 100)),
    st.builds(power_law, st.integers(0, 99), st.floats(0.1, 2)),
    st.builds(sparse, st.integers(0, 99), st.floats(0.005, 0.3)),
)


@settings(deadline=None, max_examples=40)
@given(MATRICES, st.booleans(), st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
def test_the_exponent_is_exact(weight: Tensor, wide: bool, dtype: torch.dtype) -> None:
    weight = (weight if wide else weight.T).to(dtype)
    assert pl_alpha_hill(weight) == pytest.approx(spectrum(weight).alpha, abs=1e-3)


@settings(deadline=None, max_examples=10)
@given(MATRICES)
def test_the_exponent_is_exact_with_a_float32_filter(weight: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ritz, "fast_dtype", lambda device: torch.float32)
        assert pl_alpha_hill(weight) == pytest.approx(spectrum(weight).alpha, abs=1e-3)


@pytest.mark.parametrize(("block", "tail"), [(64, 0.1), (96, 0.1), (128, 0.05), (128, 0.1)])
def test_the_exponent_is_exact_for_other_blocks_and_tails(block: int, tail: float) -> None:
    weight = student(0, 6)
    exact = spectrum(weight, block, tail=tail).alpha
    assert pl_alpha_hill(weight, block, tail=tail) == pytest.approx(exact, abs=1e-3)


def record_full_solves(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that collects the blocks that are solved in full from now on."""
    solved: list[Tensor] = []
    eigenvalues = spectra._gram_eigenvalues

    def record_blocks(pieces: Tensor) -> Tensor:
        solved.extend(pieces)
        return eigenvalues(pieces)

    monkeypatch.setattr(spectra, "_gram_eigenvalues", record_blocks)
    return solved


@pytest.mark.parametrize(
    "weight", [normal(0, ROWS, COLUMNS), student(0, 5), low_rank(0, 40, 3.0), power_law(0, 0.5)]
)
def test_few_blocks_are_solved_in_full(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = record_full_solves(monkeypatch)
    pl_alpha_hill(weight.bfloat16())
    assert len(solved) <= 6


def test_a_block_unlike_the_others_is_solved_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(0, ROWS, COLUMNS)
    outlier = weight[128:256, 256:384]
    outlier *= 1.5  # more of the tail than the subspace holds
    exact = spectrum(weight).alpha
    solved = record_full_solves(monkeypatch)
    assert pl_alpha_hill(weight) == pytest.approx(exact, abs=1e-3)
    assert any(bool((block == outlier).all()) for block in solved)


def test_a_wrong_estimate_of_the_edge_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(0, ROWS, COLUMNS)
    exact, design = spectrum(weight).alpha, ritz.design
    for factor in (0.2, 0.8, 1.2, 5.0):
        monkeypatch.setattr(ritz, "design", lambda p, *rest, f=factor: design(p * f, *rest))
        assert pl_alpha_hill(weight) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_estimate_the_error_of_ritz_values(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ritz, "fast_dtype", lambda device: dtype)
    grid = student(3, 6).unfold(0, 128, 128).unfold(1, 128, 128)
    eigenvalues = spectra._gram_eigenvalues(grid.flatten(0, 1)).flip(-1)
    chebyshev = ritz.design(eigenvalues, 0.1, 1e-3)
    assert chebyshev is not None
    result = ritz.leading(grid, chebyshev)
    checked = result.error.shape[1]
    in_tail = torch.isfinite(result.error) & (eigenvalues[:, :checked] > chebyshev.edge)
    assert int(in_tail.sum()) > 200
    shortfall = (eigenvalues[:, :checked] / result.values[:, :checked] - 1)[in_tail]
    error = result.error[in_tail]
    assert float(shortfall.min()) > -1e-5
    # Near the edge, where errors are largest, the first-order estimate is 10 to 40 % too small.
    # These errors dominate a mean, and the mean depends on the CPU's order of sums: hence the
    # median. Small errors are noise: bfloat16 adds up to 6e-6.
    estimated = error > 3e-5
    assert int(estimated.sum()) > 100
    assert 0.9 < float((shortfall / error)[estimated].median()) < 1.1
    assert float((shortfall - error).abs().mean()) < 0.25 * float(shortfall.mean())


def test_threads_do_not_change_the_exponent_and_are_restored() -> None:
    weight = normal(0, ROWS, COLUMNS).bfloat16()
    threads = torch.get_num_threads()
    single_thread = pl_alpha_hill(weight)
    torch.set_num_threads(3)
    try:
        assert pl_alpha_hill(weight) == pytest.approx(single_thread, abs=1e-4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
