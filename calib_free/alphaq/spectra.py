"""PL_Alpha_Hill: how heavy the tail of a weight matrix's spectrum is.

The signal of AlphaQ (arXiv 2606.04980): the better a matrix is trained, the heavier the tail of
its squared singular values and the smaller the exponent alpha that a Hill estimator finds.

Hill reads only the top tenth of the pooled spectrum. For matrices of many blocks
`lfmc.calib_free.alphaq.ritz` finds that much, and blocks that fail its check are solved in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmc.calib_free.alphaq import ritz
from lfmc.errors import InputError, UnsupportedError

Share = Callable[[Callable[[Tensor], Any], Tensor], list[Any]]  # results, part by part

BLOCK, TAIL = 128, 0.1
MAX_BLOCKS = 256  # more are sampled: the spectrum of that many blocks is settled
SAMPLE_SEED = 0
MIN_TAIL = 10
FLOOR = 1e-12  # eigenvalues below this share of the largest are rounding noise of the Gram matrix

SAFE_EXPONENT = 16  # weights up to 2 to this, or down to 2 to minus this, are used as they are

FEW_BLOCKS = 24  # fewer are solved in full: there is little to win
SMALL_BLOCK = 64  # and so are blocks of fewer columns
PILOTS = 2  # blocks whose full spectra say how to find the tails of the others
ALPHA_ERROR = 1e-3  # what the mean error of the tail may do to alpha, before it is corrected
OUTLIER = 10.0  # a block with an error above this times the mean allowed is solved in full
NEAR = 0.97  # eigenvalues are of the tail, or may be, above this share of the edge
UNSURE = 1.0  # errors from the edge within which the order of eigenvalues is not known


@dataclass(frozen=True)
class Spectrum:
    """The pooled spectrum of a matrix and the tail that Hill fits.

    `values` are squared singular values, float64 `[n]`, largest first, in the square of the
    weights' unit; the tail is the first `tail` of them, `edge` the next one, `alpha` the exponent
    (infinity where there is no tail).
    """

    values: Tensor
    tail: int
    edge: float
    alpha: float


def pl_alpha_hill(
    weight: Tensor, block: int = BLOCK, *, tail: float = TAIL, device: str = "cpu"
) -> float:
    """Tail exponent of a matrix `[N, K]` of any float dtype; larger than 1, without unit.

    FARMS: the squared singular values of all whole `block` x `block` pieces at stride `block`
    (at most 256, else a sample with a fixed seed) in one pool; a matrix smaller than a block
    either way gives its whole spectrum. Then Hill: `1 + k / sum(ln(top k / next one))` with
    `k = max(10, floor(tail * n))`, at most n - 1. A matrix of zeros, or one whose tail is flat,
    has no tail: infinity. Large matrices are solved only as far as Hill looks, within 1e-3 of the
    exact exponent, on `device`, "cpu" or "cuda". What has to be solved in full is solved on the
    CPU, on as many threads as torch uses: GPUs are no faster at that.

    Raises `InputError` for less than 2 rows or columns, numbers that are not finite, or a block or
    tail that make no sense, and `UnsupportedError` where there is no such device.
    """
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise UnsupportedError("there is no such device", expected="cpu, or cuda", got=device)
    with _threads() as share:
        grid, _ = _grid(weight, block, tail)
        count = grid.shape[0] * grid.shape[1]
        k = tail_count(count * min(grid.shape[2:]), tail)
        if count >= FEW_BLOCKS and _worthwhile(block, tail):
            found = _leading(grid, k, tail, share, device)
            if found is not None:
                return _hill(found, k)
        return _hill(_pool(_full(grid.flatten(0, 1), share)), k)


def spectrum(weight: Tensor, block: int = BLOCK, *, tail: float = TAIL) -> Spectrum:
    """The whole pooled spectrum of a matrix `[N, K]`, exact, and where its tail begins.

    For reports: it takes several times as long as `pl_alpha_hill`. Blocks, tail and errors are
    the same.
    """
    with _threads() as share:
        grid, exponent = _grid(weight, block, tail)
        values = _pool(_full(grid.flatten(0, 1), share))
    k = tail_count(values.numel(), tail)
    scaled = values * 2.0**exponent * 2.0**exponent
    return Spectrum(scaled, k, float(scaled[k]), _hill(values, k))


def tail_count(count: int, tail: float = TAIL) -> int:
    """How many of `count` eigenvalues Hill fits."""
    return min(max(MIN_TAIL, int(tail * count)), count - 1)


def check_options(block: int, tail: float) -> None:
    """Raise `InputError` for a block below 2 or a tail that is no share."""
    if block < 2:
        raise InputError("a block of a spectrum is too small", expected="2 or more", got=block)
    if not 0.0 < tail < 1.0:
        raise InputError(
            "the tail of a spectrum is a share of it", expected="above 0, below 1", got=tail
        )


def _hill(values: Tensor, k: int) -> float:
    """Hill's exponent of the k largest of `values`, which are sorted; the next one is the edge."""
    largest = float(values[0])
    if largest <= 0.0:
        return math.inf
    floored = values.clamp(min=largest * FLOOR)
    logs = float((floored[:k] / floored[k]).log().sum())
    return math.inf if logs <= 0 else 1.0 + k / logs


def _grid(weight: Tensor, block: int, tail: float) -> tuple[Tensor, int]:
    """Whole blocks `[R, C, block, block]`, a view where it can be, and an exponent.

    `[1, 1, N, K]` where the matrix has no whole block. Blocks are the weights over 2 to the
    exponent, which is 0 unless powers of the weights could overflow or vanish.
    """
    check_options(block, tail)
    if weight.dim() != 2 or min(weight.shape) < 2:
        raise InputError(
            "a spectrum needs a matrix", expected="2 rows and columns", got=list(weight.shape)
        )
    weight = weight.detach()
    low, high = (float(bound) for bound in torch.aminmax(weight))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("a spectrum needs finite numbers", got="NaN or infinity in the weights")
    exponent = math.frexp(max(-low, high))[1]
    grid = _cut(weight, block)
    if abs(exponent) <= SAFE_EXPONENT:
        return grid, 0
    half = exponent // 2  # in two steps: 2 to the whole may be more than float64 holds
    return grid.double() * 2.0**-half * 2.0 ** (half - exponent), exponent


def _cut(weight: Tensor, block: int) -> Tensor:
    if min(weight.shape) < block:
        return weight[None, None]
    grid = weight.unfold(0, block, block).unfold(1, block, block)
    if grid.shape[0] < grid.shape[1]:
        grid = grid.transpose(0, 1)  # the first dimension is what threads share
    count = grid.shape[0] * grid.shape[1]
    if count <= MAX_BLOCKS:
        return grid
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    sample = torch.randperm(count, generator=generator)[:MAX_BLOCKS]
    return _blocks(grid, sample).unsqueeze(1)


def _full(pieces: Tensor, share: Share) -> Tensor:
    """Squared singular values of blocks `[P, N, K]`: float64 `[P, min(N, K)]`, ascending.

    They are the eigenvalues of the Gram matrices: as exact in float64 where the tail is read, and
    faster than an SVD a block.
    """
    return torch.cat(share(_gram_eigenvalues, pieces))


def _gram_eigenvalues(pieces: Tensor) -> Tensor:
    pieces = pieces.double()
    if pieces.shape[1] > pieces.shape[2]:
        pieces = pieces.transpose(1, 2)
    values: Tensor = torch.linalg.eigvalsh(pieces @ pieces.transpose(1, 2))
    return values.clamp(min=0.0)


def _pool(values: Tensor) -> Tensor:
    """All values `[n]`, largest first; numpy sorts several times as fast as torch."""
    return torch.from_numpy(-np.sort(-values.flatten().numpy()))


def _worthwhile(block: int, tail: float) -> bool:
    """Whether a few Ritz values cost less than all eigenvalues of a block."""
    return block >= SMALL_BLOCK and 4 * ritz.subspace_size(block, tail) <= block


def _leading(grid: Tensor, k: int, tail: float, share: Share, device: str) -> Tensor | None:
    """Eigenvalues of the tail and some below, pooled and sorted, float64; None where it can't.

    The `k + 1` largest are those of the whole pool, near enough for `ALPHA_ERROR`.
    """
    count = grid.shape[0] * grid.shape[1]
    pilots = torch.linspace(0, count - 1, PILOTS).long()
    whole = _full(_blocks(grid, pilots), share)
    steepness = _hill(_pool(whole), tail_count(whole.numel(), tail)) - 1
    if not math.isfinite(steepness):
        return None
    chebyshev = ritz.design(whole.flip(-1), tail, ALPHA_ERROR / 4 / steepness**2)
    if chebyshev is None:
        return None
    if device == "cpu":
        found = ritz.join(share(partial(ritz.leading, chebyshev=chebyshev), grid))
    else:
        found = ritz.leading(grid.to(device), chebyshev)
    values, checked = found.values.clone(), found.error.shape[1]
    values[:, :checked] *= 1 + found.error
    solved = torch.zeros(count, dtype=torch.bool)
    solved[pilots] = True
    failed = ~solved & torch.isinf(found.error).any(dim=1)
    while True:
        if bool(failed.any()):
            again = _full(_blocks(grid, failed.nonzero().flatten()), share)
            whole = torch.cat([whole, again])
            solved |= failed
        pooled = _pool(torch.cat([values[~solved].flatten(), whole.flatten()]))
        failed = ~solved & _failed(values, found.error, solved, pooled, k)
        if not bool(failed.any()):
            return pooled


def _failed(values: Tensor, error: Tensor, solved: Tensor, pooled: Tensor, k: int) -> Tensor:
    """Blocks `[P]` whose corrected Ritz values are not good enough for the tail of `pooled`.

    Those with too large an error or more of the tail than has one, and, since errors of the edge
    do not average out, those with a value so near to it that their order is not known.
    """
    edge, steepness = float(pooled[k]), _hill(pooled, k) - 1
    allowed = ALPHA_ERROR / steepness**2  # alpha moves by (alpha - 1)^2 times the mean error
    checked = values[:, : error.shape[1]]
    own = torch.where(checked > NEAR * edge, error, 0.0)
    crowded = values[:, error.shape[1]] > NEAR * edge
    unsure = ((checked / edge - 1).abs() <= UNSURE * error).any(dim=1)
    failed = (own.amax(dim=1) > OUTLIER * allowed) | crowded | unsure
    kept = ~failed & ~solved
    if float(own[kept].sum()) > allowed * k:
        failed |= own.sum(dim=1) > allowed * k / len(values)
    return failed


def _blocks(grid: Tensor, indices: Tensor) -> Tensor:
    """Blocks `[P, n, n]` of a grid, counted row by row."""
    columns = grid.shape[1]
    return grid[indices // columns, indices % columns]


@contextmanager
def _threads() -> Iterator[Share]:
    """A way to call a function on equal parts of blocks, one a thread, as many as torch has.

    Blocks are small: torch's own threads would start and stop once an operation, and those that
    wait keep the processor busy. So torch has one thread meanwhile.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield lambda function, blocks: [function(blocks)]
        return
    torch.set_num_threads(1)  # of this thread, and the default of those that are new
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield lambda function, blocks: list(
                pool.map(function, blocks.split(-(-len(blocks) // threads)))
            )
    finally:
        torch.set_num_threads(threads)
