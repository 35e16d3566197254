"""The largest eigenvalues of many small Gram matrices, without solving for the others.

A spectrum's tail is the top tenth of 128 eigenvalues a block, and a full eigendecomposition spends
nearly all of its time on the rest. Here, for the Gram matrix G of each block:

1. A Chebyshev polynomial p(G), at most 1 on [0, a] and growing fast above, is applied to a random
   subspace (Zhou, Saad, Tiago & Chelikowsky 2006). `a` and the degree come from a pilot: a few
   blocks solved in full. The steps are bfloat16 where the processor multiplies it faster: rounding
   turns the subspace a little, and eigenvalues feel the square of that.
2. Rayleigh-Ritz in float32: eigenvalues of G on the subspace, never above the true ones.
3. A check, block by block: residual norms of the Ritz vectors at the edge of the tail bound how far
   the eigenvalues there can be above the Ritz values, a Cholesky factor says how independent the
   subspace's vectors are. Blocks that fail are for the caller to solve in full.

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
PROBES = 4  # random combinations of the Ritz vectors next to the edge, whose residuals are measured
WINDOW = 0.05  # their width, relative to the edge
CHUNK = 56  # blocks in flight a thread: their matrices stay in the cache
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

    def gain(self, values: Tensor) -> Tensor:
        """p at eigenvalues above `cut`, any shape; below, 1."""
        angle = torch.acosh((2 * values / self.cut - 1).clamp(min=1.0))
        return torch.stack([torch.cosh(degree * angle) for degree in self.stages]).prod(dim=0)


@dataclass(frozen=True)
class Leading:
    """Ritz values `[P, size]`, largest first, float64, and what the check found, `[P]`.

    `error` is how far, relatively, eigenvalues at the edge are above their Ritz values, judged by
    residuals; infinity where the arithmetic broke down.
    """

    values: Tensor
    error: Tensor


def subspace_size(n: int, tail: float) -> int:
    """Columns for a tail share of n eigenvalues a block: three quarters more than it holds."""
    return 8 * math.ceil(1.75 * tail * n / 8)


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
    powers of them must fit float32.
    """
    rows, columns, n, _ = grid.shape
    chunks = max(1, round(rows * columns / CHUNK))
    parts = grid.split(-(-rows // chunks))
    # Reused by every chunk: touching fresh memory takes as long as the arithmetic.
    size = len(parts[0]) * columns
    exact = torch.empty(size, n, n)
    stored, gram, square = (torch.empty(size, n, n, dtype=fast_dtype()) for _ in range(3))
    found = []
    for part in parts:
        count = len(part) * columns
        exact[:count].view(part.shape).copy_(part)
        stored[:count].copy_(exact[:count])
        scratch = (gram[:count], square[:count])
        found.append(_leading(exact[:count], stored[:count], chebyshev, scratch))
    values, errors = zip(*found, strict=True)
    return Leading(torch.cat(values).double(), torch.cat(errors).double())


def _leading(
    exact: Tensor, stored: Tensor, chebyshev: Filter, scratch: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Ritz values `[C, m]` and errors `[C]` of one chunk, in float32 and in the filter's dtype."""
    operator, stages = _operator(stored, chebyshev, *scratch)
    rows, info = _filtered(operator, stages, chebyshev.size)
    overlap = rows @ rows.mT
    factor, more = torch.linalg.cholesky_ex(overlap)
    eye = torch.eye(chebyshev.size).expand_as(overlap)
    basis = torch.linalg.solve_triangular(factor, eye, upper=False) @ rows
    image = basis @ exact
    ritz = image @ image.mT
    pivots = factor.diagonal(dim1=1, dim2=2) / overlap.diagonal(dim1=1, dim2=2).sqrt()
    sound = (info == 0) & (more == 0) & (pivots.amin(dim=1) > MIN_PIVOT)
    sound &= torch.isfinite(ritz).all(dim=2).all(dim=1)
    if not bool(sound.all()):
        ritz = torch.where(sound[:, None, None], ritz, eye)
    values = torch.linalg.eigvalsh(ritz).flip(-1)
    error = _edge_error(exact, basis, image, ritz, chebyshev)
    return values, torch.where(sound, error, math.inf)


def join(parts: Sequence[Leading]) -> Leading:
    """What was found for parts of the blocks, as one."""
    return Leading(torch.cat([p.values for p in parts]), torch.cat([p.error for p in parts]))


def shortfall(found: Leading, chebyshev: Filter, values: Tensor) -> Tensor:
    """How far, relatively, Ritz values `[P, any]` may lie below eigenvalues, by `found.error`.

    Above the edge less, below it more: shortfalls go with the gain squared. At most 100 times
    the error at the edge; infinity where the arithmetic broke down.
    """
    at_edge = chebyshev.gain(torch.tensor(chebyshev.edge, dtype=torch.float64))
    return found.error[:, None] * (at_edge / chebyshev.gain(values)).square().clamp(max=100.0)


@cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor has instructions for its products, else float32."""
    known = torch.cpu.get_capabilities()
    fast = known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


@cache
def _random(n: int, size: int) -> Tensor:
    """The subspace that every block starts from, orthonormal rows `[size, n]`."""
    generator = torch.Generator().manual_seed(SUBSPACE_SEED)
    start = torch.linalg.qr(torch.randn(n, size, generator=generator)).Q
    return start.T.contiguous()


def _operator(
    blocks: Tensor, chebyshev: Filter, gram: Tensor, square: Tensor
) -> tuple[Tensor, Sequence[int]]:
    """The Gram matrices scaled so that [0, a] becomes [-1, 1], and the degrees to apply.

    With even degrees it is T_2 of that, T_2k(x) = T_k(T_2(x)): half as many products follow.
    """
    torch.baddbmm(gram, blocks, blocks.mT, beta=0, alpha=2 / chebyshev.cut, out=gram)
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    if gram.dtype == torch.float32 or any(degree % 2 for degree in chebyshev.stages):
        return gram, chebyshev.stages
    torch.baddbmm(square, gram, gram, beta=0, alpha=2, out=square)
    square.diagonal(dim1=1, dim2=2).sub_(1)
    return square, [degree // 2 for degree in chebyshev.stages]


def _filtered(operator: Tensor, stages: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """The polynomial times the random subspace, float32 `[C, m, n]`; 0 `[C]` where it is sound."""
    count, n, _ = operator.shape
    now = _random(n, size).to(operator.dtype).expand(count, -1, -1)
    info = torch.zeros(count, dtype=torch.int32)
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
    eye = torch.eye(gram.shape[1]).expand_as(gram)
    return torch.linalg.solve_triangular(factor, eye, upper=False) @ rows, info


def _edge_error(
    exact: Tensor, basis: Tensor, image: Tensor, ritz: Tensor, chebyshev: Filter
) -> Tensor:
    """Relative error of eigenvalues at the edge, `[P]`, from residuals.

    With R = (1 - Q Q') G Q, eigenvalues at the edge are those of the Ritz matrix H plus
    R' (edge - C)^-1 R, where C is G on the complement; C is taken for its mean, `REST` of a.
    |R v|^2 is measured for random combinations v of the Ritz vectors next to the edge: random
    vectors, twice multiplied by (w^2 + (H - edge)^2)^-1, which damps all others.
    """
    edge, width = chebyshev.edge, WINDOW * chebyshev.edge
    generator = torch.Generator().manual_seed(SUBSPACE_SEED)
    random = torch.randn(chebyshev.size, PROBES, generator=generator).expand(len(ritz), -1, -1)
    eye = torch.eye(chebyshev.size)
    moved = ritz / width - (edge / width) * eye
    factor, _ = torch.linalg.cholesky_ex(torch.baddbmm(eye, moved, moved))
    found = torch.cholesky_solve(torch.cholesky_solve(random, factor), factor)
    probes = torch.nn.functional.normalize(found, dim=1).mT  # (C, probes, m)
    outside = torch.baddbmm((probes @ image) @ exact.mT, probes @ ritz, basis, alpha=-1)
    squares = outside.square().sum(dim=2).mean(dim=1)
    return squares / ((edge - REST * chebyshev.cut) * edge)
