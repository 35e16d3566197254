"""The largest eigenvalues of many small Gram matrices, without solving for the others.

A spectrum's tail is the top tenth of 128 eigenvalues a block, and a full eigendecomposition spends
nearly all of its time on the rest. Here, for the Gram matrix G of each block:

1. A Chebyshev polynomial p(G), at most 1 on [0, a] and growing fast above, is applied to a random
   subspace (Zhou, Saad, Tiago & Chelikowsky 2006). `a` and the degree come from a pilot: a few
   blocks solved in full. The steps are bfloat16 where the processor multiplies it faster: rounding
   turns the subspace a little, and eigenvalues feel the square of that.
2. Rayleigh-Ritz in float32: eigenvalues of G on the subspace, never above the true ones.
3. A check, block by block: the residual of every Ritz vector in the tail says how far its
   eigenvalue is above the Ritz value, a Cholesky factor how independent the subspace's vectors
   are. Blocks that fail are for the caller to solve in full.

An eigenvalue could be missed without a trace only if the random subspace is orthogonal to its
vector: for 24 dimensions of 128 and a gain of 1,000 that has a probability below 1e-40.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SUBSPACE_SEED = 0
REST = 0.4  # where the rest of the spectrum lies on average, relative to the end of the damped
CHUNK = 56  # blocks in flight a thread: their matrices stay in the cache; a GPU takes all
MAX_STAGE = 4  # degree between two orthogonalizations; bfloat16 loses what grows apart more
MAX_DEGREE = 14
GROWTH = 4.5  # and the largest may outgrow the edge by exp of this
MIN_PIVOT = 0.03  # of unit rows; below, float32 Cholesky costs more digits than eigenvalues need
MAX_RATIO = 200.0  # largest eigenvalue over edge; above, the spectrum is for the full solver


@dataclass(frozen=True)
class Filter:
    """A Chebyshev filter: `cut` is a, the end of what it damps; `edge` where the tail begins.

    `stages` are the degrees between orthogonalizations, `size` the columns of the subspace.
    """

    cut: float
    edge: float
    stages: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Leading:
    """Ritz values `[P, size]`, largest first, and relative errors of the first `[P, checked]`.

    Both float64. By its residual an eigenvalue is about `1 + error` times its Ritz value; infinity
    where the arithmetic broke down.
    """

    values: Tensor
    error: Tensor


def subspace_size(n: int, tail: float) -> int:
    """Columns for a tail share of n eigenvalues a block: three quarters more than it holds."""
    return 8 * math.ceil(1.75 * tail * n / 8)


def checked_size(size: int) -> int:
    """How many of the Ritz values have an error: more than a tail's share of a usual block."""
    return 2 * size // 3


def design(pilot: Tensor, tail: float, tolerance: float) -> Filter | None:
    """A filter for blocks whose spectra look like `pilot` `[P, n]`, largest first.

    `tolerance` is the relative error that eigenvalues at the edge may have. None where the tail
    has no gain to offer: a spectrum too flat below it, or too steep within.
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
    wanted = math.sqrt((n - size) / tolerance)
    degree = math.ceil(math.acosh(wanted) / max(angle, 1e-3))
    if degree > MAX_DEGREE:
        return None
    spread = math.acosh(2 * largest / cut - 1) - angle
    longest = max(1, min(MAX_STAGE, int(GROWTH / max(spread, 1e-3))))
    if longest == 1:  # so steep that rounding costs about as much as two
        degree += 2
    count = max(2, -(-degree // longest))
    stages = tuple(degree // count + (i < degree % count) for i in range(count))
    return Filter(cut, edge, stages, size)


def leading(grid: Tensor, chebyshev: Filter) -> Leading:
    """Leading eigenvalues of the Gram matrices `B B'` of blocks `[R, C, n, n]`, any float dtype.

    P = R C, row by row; a view of the whole matrix will do. Entries should be near 1 in size:
    powers of them must fit float32. The result is on the CPU, wherever the blocks are.
    """
    rows, columns, n, _ = grid.shape
    device, dtype = grid.device, fast_dtype(grid.device.type)
    chunks = max(1, round(rows * columns / CHUNK)) if device.type == "cpu" else 1
    parts = grid.split(-(-rows // chunks))
    # Reused by every chunk: touching fresh memory takes as long as the arithmetic.
    size = len(parts[0]) * columns
    exact = torch.empty(size, n, n, device=device)
    stored, gram = (torch.empty(size, n, n, dtype=dtype, device=device) for _ in range(2))
    found = []
    for part in parts:
        count = len(part) * columns
        # From the view without a conversion where it can be, then from one to the other: copies
        # that convert and gather at once are slow.
        first, second = (stored, exact) if part.dtype == stored.dtype else (exact, stored)
        first[:count].view(part.shape).copy_(part)
        second[:count].copy_(first[:count])
        found.append(_leading(exact[:count], stored[:count], gram[:count], chebyshev))
    values, errors = zip(*found, strict=True)
    return Leading(torch.cat(values).cpu().double(), torch.cat(errors).cpu().double())


def _leading(
    exact: Tensor, stored: Tensor, gram: Tensor, chebyshev: Filter
) -> tuple[Tensor, Tensor]:
    """Ritz values `[C, m]` and errors `[C, R]` of a chunk, in float32 and in the filter's dtype.

    `stored` and `gram` are overwritten.
    """
    operator, stages = _operator(stored, gram, chebyshev)
    rows, info = _filtered(operator, stages, chebyshev.size)
    overlap = rows @ rows.mT
    factor, more = torch.linalg.cholesky_ex(overlap)
    eye = torch.eye(chebyshev.size, device=overlap.device).expand_as(overlap)
    basis = torch.linalg.solve_triangular(factor, eye, upper=False) @ rows
    image = basis @ exact
    ritz = image @ image.mT
    pivots = factor.diagonal(dim1=1, dim2=2) / overlap.diagonal(dim1=1, dim2=2).sqrt()
    sound = (info == 0) & (more == 0) & (pivots.amin(dim=1) > MIN_PIVOT)
    sound &= torch.isfinite(ritz).all(dim=2).all(dim=1)
    if not bool(sound.all()):
        ritz = torch.where(sound[:, None, None], ritz, eye)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(ritz))
    checked = checked_size(chebyshev.size)
    errors = _errors(gram, basis, values[:, :checked], vectors[:, :, :checked], chebyshev)
    return values, torch.where(sound[:, None], errors, math.inf)


def join(parts: Sequence[Leading]) -> Leading:
    """What was found for parts of the blocks, as one."""
    return Leading(torch.cat([p.values for p in parts]), torch.cat([p.error for p in parts]))


@cache
def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where that processor has instructions for its products, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    known = torch.cpu.get_capabilities()
    fast = known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


@cache
def _random(n: int, size: int) -> Tensor:
    """The subspace that every block starts from, orthonormal rows `[size, n]`."""
    generator = torch.Generator().manual_seed(SUBSPACE_SEED)
    start: Tensor = torch.linalg.qr(torch.randn(n, size, generator=generator)).Q
    return start.T.contiguous()


def _operator(stored: Tensor, gram: Tensor, chebyshev: Filter) -> tuple[Tensor, Sequence[int]]:
    """Gram matrices, scaled so that [0, a] becomes [-1, 1], into `gram`; what to filter with.

    That is an operator and the degrees to apply. With even degrees it is T_2 of the Gram matrix,
    written over `stored`: T_2k(x) = T_k(T_2(x)), so half as many products follow.
    """
    torch.baddbmm(gram, stored, stored.mT, beta=0, alpha=2 / chebyshev.cut, out=gram)
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    if gram.dtype == torch.float32 or any(degree % 2 for degree in chebyshev.stages):
        return gram, chebyshev.stages
    torch.baddbmm(stored, gram, gram, beta=0, alpha=2, out=stored)
    stored.diagonal(dim1=1, dim2=2).sub_(1)
    return stored, [degree // 2 for degree in chebyshev.stages]


def _filtered(operator: Tensor, stages: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """The polynomial times the random subspace, float32 `[C, m, n]`; 0 `[C]` where it is sound."""
    count, n, _ = operator.shape
    now = _random(n, size).to(operator).expand(count, -1, -1)
    info = torch.zeros(count, dtype=torch.int32, device=operator.device)
    for stage, degree in enumerate(stages):
        if stage:
            basis, broken = _orthonormal(now.float())
            now, info = basis.to(operator.dtype), info | broken
        before, now = now, torch.bmm(now, operator)
        for _ in range(degree - 1):
            before, now = now, torch.baddbmm(before, now, operator, beta=-1, alpha=2)
    return now.float(), info


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows `[P, m, n]` of the same span, by Cholesky, and LAPACK's info `[P]`."""
    gram = rows @ rows.mT
    factor, info = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[1], device=gram.device).expand_as(gram)
    return torch.linalg.solve_triangular(factor, eye, upper=False) @ rows, info


def _errors(
    gram: Tensor, basis: Tensor, values: Tensor, vectors: Tensor, chebyshev: Filter
) -> Tensor:
    """Relative errors `[C, R]` of Ritz values `[C, R]` from the residuals of their vectors.

    `vectors` `[C, m, R]` are coordinates in the basis, `gram` is 2 G / a - 1 in the filter's dtype;
    bfloat16 adds 3e-6 to 6e-6. With r = G v - h v, the eigenvalue is h + r' (h - C)^-1 r to the
    second order, where C is G on the complement of the subspace: taken for its mean.
    """
    scale, rest = 2 / chebyshev.cut, REST * chebyshev.cut
    found = (vectors.mT @ basis).to(gram.dtype)  # (C, R, n)
    residual = torch.bmm(found, gram).float()
    residual.addcmul_(found.float(), (scale * values - 1)[:, :, None], value=-1)
    squares = residual.square_().sum(dim=2) / scale**2
    return squares / ((values - rest).clamp(min=0.1 * rest) * values)
