"""The largest eigenvalues of many small Gram matrices, without the other eigenvalues.

The tail of a spectrum is the top tenth of 128 eigenvalues per block, and a full eigendecomposition
spends nearly all its time on the others. This module does the following with the Gram matrix G of
each block:

1. It applies a Chebyshev polynomial p(G), at most 1 on [0, a] and growing fast above, to a random
   subspace (Zhou, Saad, Tiago & Chelikowsky 2006). `a` and the degree come from pilots: a few
   blocks solved in full. The steps use bfloat16 if the processor multiplies bfloat16 faster.
   Rounding rotates the subspace slightly; the error of the eigenvalues is quadratic in this angle.
2. It applies Rayleigh-Ritz in float32: eigenvalues of G on the subspace, never above the true ones.
3. It checks each block. The residual of every Ritz vector in the tail estimates how far its
   eigenvalue is above the Ritz value. A Cholesky factor measures how independent the vectors of the
   subspace are. The caller solves the blocks that fail in full.

An eigenvalue could be missed undetected only if the random subspace is orthogonal to its
eigenvector: for 24 dimensions of 128 and a gain of 1,000 the probability is below 1e-40.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SUBSPACE_SEED = 0
REST = 0.4  # mean of the rest of the spectrum, relative to the end of the damped interval
CHUNK = 56  # blocks at a time per thread, so that they stay in the cache; a GPU takes all
MAX_STAGE = 4  # degree between two orthogonalizations; bfloat16 loses precision above
MAX_DEGREE = 14
GROWTH = 4.5  # within a stage, the largest eigenvalue may outgrow the edge by exp of this
MIN_PIVOT = 0.03  # of unit rows; below, float32 Cholesky loses digits that eigenvalues need
MAX_RATIO = 200.0  # largest eigenvalue over edge; above, blocks are solved in full


@dataclass(frozen=True)
class Filter:
    """A Chebyshev filter.

    `cut` is a, the end of the damped interval. `edge` is the eigenvalue where the tail begins.
    `stages` are the degrees between orthogonalizations, and `size` is the subspace's dimension.
    """

    cut: float
    edge: float
    stages: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Leading:
    """Ritz values `[P, size]`, largest first, and relative errors of the first `[P, checked]`.

    Both are float64. An eigenvalue is about `1 + error` times its Ritz value, estimated from the
    residual. The error is infinity if the arithmetic broke down.
    """

    values: Tensor
    error: Tensor


def subspace_size(n: int, tail: float) -> int:
    """Return the subspace dimension, 1.75 * tail * n rounded up to a multiple of 8."""
    return 8 * math.ceil(1.75 * tail * n / 8)


def checked_size(size: int) -> int:
    """Return how many Ritz values have an error estimate: more than the tail of a typical block."""
    return 2 * size // 3


def design(pilot: Tensor, tail: float, tolerance: float) -> Filter | None:
    """Return a filter for blocks whose spectra look like `pilot` `[P, n]`, largest first, or None.

    `tolerance` is the allowed relative error of eigenvalues at the edge. Returns None if a filter
    would not be faster: the spectrum is too flat below the tail, or too steep within it.
    """
    n = pilot.shape[1]
    size = subspace_size(n, tail)
    pooled = pilot.flatten().sort(descending=True).values
    edge, cut = (float(pooled[int(share * pooled.numel())]) for share in (tail, size / n))
    largest = float(pilot[:, 0].median())
    if not 0.0 < cut < edge < largest <= MAX_RATIO * edge:
        return None
    angle = math.acosh(2 * edge / cut - 1)
    # The expected squared angle is below (n - size) / gain^2, times about 1 for the random start.
    gain = math.sqrt((n - size) / tolerance)
    degree = math.ceil(math.acosh(gain) / max(angle, 1e-3))
    if degree > MAX_DEGREE:
        return None
    growth = math.acosh(2 * largest / cut - 1) - angle
    stage_degree = max(1, min(MAX_STAGE, int(GROWTH / max(growth, 1e-3))))
    if stage_degree == 1:  # so steep that rounding costs about two degrees
        degree += 2
    count = max(2, -(-degree // stage_degree))
    stages = tuple(degree // count + (i < degree % count) for i in range(count))
    return Filter(cut, edge, stages, size)


def leading(grid: Tensor, chebyshev: Filter) -> Leading:
    """Compute leading eigenvalues of the Gram matrices `B B'` of blocks `[R, C, n, n]`.

    The blocks have any float dtype, and may be a view of the whole matrix. P = R C, row by row. The
    magnitude of the entries should be near 1: their powers must fit float32. The result is on the
    CPU, even if the blocks are on a GPU.
    """
    rows, columns, n, _ = grid.shape
    device, dtype = grid.device, fast_dtype(grid.device.type)
    chunks = max(1, round(rows * columns / CHUNK)) if device.type == "cpu" else 1
    parts = grid.split(-(-rows // chunks))
    # Reused by all chunks: the first access to new memory takes as long as the arithmetic.
    size = len(parts[0]) * columns
    float32_blocks = torch.empty(size, n, n, device=device)
    fast_blocks, gram = (torch.empty(size, n, n, dtype=dtype, device=device) for _ in range(2))
    results = []
    for part in parts:
        count = len(part) * columns
        # Copy from the view without a conversion if possible, then convert from one buffer to the
        # other: copies that convert and gather at once are slow.
        source, converted = (
            (fast_blocks, float32_blocks)
            if part.dtype == fast_blocks.dtype
            else (float32_blocks, fast_blocks)
        )
        source[:count].view(part.shape).copy_(part)
        converted[:count].copy_(source[:count])
        results.append(
            _solve_chunk(float32_blocks[:count], fast_blocks[:count], gram[:count], chebyshev)
        )
    values, errors = zip(*results, strict=True)
    return Leading(torch.cat(values).cpu().double(), torch.cat(errors).cpu().double())


def _solve_chunk(
    float32_blocks: Tensor, fast_blocks: Tensor, gram: Tensor, chebyshev: Filter
) -> tuple[Tensor, Tensor]:
    """Return the Ritz values `[C, m]` and errors `[C, R]` of a chunk.

    `float32_blocks` and `fast_blocks` are the same blocks, in float32 and in the filter's dtype.
    `fast_blocks` and `gram` are overwritten.
    """
    operator, stages = _filter_operator(fast_blocks, gram, chebyshev)
    rows, info = _apply_filter(operator, stages, chebyshev.size)
    overlap = rows @ rows.mT
    factor, overlap_info = torch.linalg.cholesky_ex(overlap)
    eye = torch.eye(chebyshev.size, device=overlap.device).expand_as(overlap)
    basis = torch.linalg.solve_triangular(factor, eye, upper=False) @ rows
    image = basis @ float32_blocks
    ritz = image @ image.mT
    pivots = factor.diagonal(dim1=1, dim2=2) / overlap.diagonal(dim1=1, dim2=2).sqrt()
    sound = (info == 0) & (overlap_info == 0) & (pivots.amin(dim=1) > MIN_PIVOT)
    sound &= torch.isfinite(ritz).all(dim=2).all(dim=1)
    if not bool(sound.all()):
        ritz = torch.where(sound[:, None, None], ritz, eye)
    values, vectors = (ascending.flip(-1) for ascending in torch.linalg.eigh(ritz))
    checked = checked_size(chebyshev.size)
    errors = _relative_errors(gram, basis, values[:, :checked], vectors[:, :, :checked], chebyshev)
    return values, torch.where(sound[:, None], errors, math.inf)


def join(parts: Sequence[Leading]) -> Leading:
    """Concatenate the results of parts of the blocks."""
    return Leading(torch.cat([p.values for p in parts]), torch.cat([p.error for p in parts]))


@cache
def fast_dtype(device: str) -> torch.dtype:
    """Return bfloat16 if the processor has instructions for bfloat16 products, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


@cache
def _random_subspace(n: int, size: int) -> Tensor:
    """Return the starting subspace of every block, as orthonormal rows `[size, n]`."""
    generator = torch.Generator().manual_seed(SUBSPACE_SEED)
    start: Tensor = torch.linalg.qr(torch.randn(n, size, generator=generator)).Q
    return start.T.contiguous()


def _filter_operator(
    fast_blocks: Tensor, gram: Tensor, chebyshev: Filter
) -> tuple[Tensor, Sequence[int]]:
    """Return the operator to filter with and the degrees to apply.

    Writes the Gram matrices into `gram`, scaled so that [0, a] becomes [-1, 1], and returns them as
    the operator. If all degrees are even and the dtype is not float32, the operator is T_2 of the
    Gram matrices instead, written over `fast_blocks`. T_2k(x) = T_k(T_2(x)), so this halves the
    number of products that follow.
    """
    torch.baddbmm(gram, fast_blocks, fast_blocks.mT, beta=0, alpha=2 / chebyshev.cut, out=gram)
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    if gram.dtype == torch.float32 or any(degree % 2 for degree in chebyshev.stages):
        return gram, chebyshev.stages
    torch.baddbmm(fast_blocks, gram, gram, beta=0, alpha=2, out=fast_blocks)
    fast_blocks.diagonal(dim1=1, dim2=2).sub_(1)
    return fast_blocks, [degree // 2 for degree in chebyshev.stages]


def _apply_filter(operator: Tensor, stages: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Apply the polynomial to the random subspace: float32 `[C, m, n]`, and LAPACK's info `[C]`.

    The info is 0 if all orthogonalizations of the block succeeded.
    """
    count, n, _ = operator.shape
    current = _random_subspace(n, size).to(operator).expand(count, -1, -1)
    info = torch.zeros(count, dtype=torch.int32, device=operator.device)
    for stage, degree in enumerate(stages):
        if stage:
            basis, basis_info = _orthonormalize(current.float())
            current, info = basis.to(operator.dtype), info | basis_info
        previous, current = current, torch.bmm(current, operator)
        for _ in range(degree - 1):
            following = torch.baddbmm(previous, current, operator, beta=-1, alpha=2)
            previous, current = current, following
    return current.float(), info


def _orthonormalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows `[P, m, n]` with the span of `rows`, by Cholesky, and info `[P]`."""
    gram = rows @ rows.mT
    factor, info = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[1], device=gram.device).expand_as(gram)
    return torch.linalg.solve_triangular(factor, eye, upper=False) @ rows, info


def _relative_errors(
    gram: Tensor, basis: Tensor, values: Tensor, vectors: Tensor, chebyshev: Filter
) -> Tensor:
    """Return relative errors `[C, R]` of Ritz values `[C, R]` from the residuals of their vectors.

    `vectors` `[C, m, R]` are coordinates in the basis. `gram` is 2 G / a - 1 in the filter's dtype;
    bfloat16 adds an error of 3e-6 to 6e-6. With r = G v - h v, the eigenvalue is
    h + r' (h - C)^-1 r to second order. C is G on the complement of the subspace, and is
    approximated by its mean.
    """
    scale, complement_mean = 2 / chebyshev.cut, REST * chebyshev.cut
    ritz_vectors = (vectors.mT @ basis).to(gram.dtype)  # (C, R, n)
    residual = torch.bmm(ritz_vectors, gram).float()
    residual.addcmul_(ritz_vectors.float(), (scale * values - 1)[:, :, None], value=-1)
    squares = residual.square_().sum(dim=2) / scale**2
    return squares / ((values - complement_mean).clamp(min=0.1 * complement_mean) * values)
