"""PL_Alpha_Hill: the tail exponent of a weight matrix's spectrum.

This is the signal of AlphaQ (arXiv 2606.04980): the better a matrix is trained, the heavier is the
tail of its squared singular values, and the smaller is the exponent alpha of a Hill estimator.

The Hill estimator reads only the top tenth of the pooled spectrum. For matrices of many blocks,
`lfmc.calib_free.alphaq.ritz` computes only this part. Blocks that fail its check are solved in
full.
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

MapParts = Callable[[Callable[[Tensor], Any], Tensor], list[Any]]  # results, one per part

BLOCK, TAIL = 128, 0.1
MAX_BLOCKS = 256  # more blocks are sampled: the spectrum of this many blocks is stable
SAMPLE_SEED = 0
MIN_TAIL = 10
FLOOR = 1e-12  # eigenvalues below this share of the largest are rounding noise of the Gram matrix

SAFE_EXPONENT = 16  # weights are not scaled if their largest is within 2^-16 to 2^16

FEW_BLOCKS = 24  # matrices of fewer blocks are solved in full: there is little to gain
SMALL_BLOCK = 64  # matrices whose blocks have fewer columns are solved in full, too
PILOTS = 2  # blocks that are solved in full to design the filter for the others
ALPHA_ERROR = 1e-3  # bound on the error of alpha from the tail's mean error, before its correction
OUTLIER = 10.0  # a block whose error exceeds this times the allowed mean is solved in full
NEAR = 0.97  # eigenvalues above this share of the edge may belong to the tail
UNSURE = 1.0  # within this many errors of the edge, the order of eigenvalues is not known


@dataclass(frozen=True)
class Spectrum:
    """The pooled spectrum of a matrix, and the tail that the Hill estimator fits.

    `values` are squared singular values, float64 `[n]`, largest first, in the square of the
    weights' unit. The tail is the first `tail` of them, `edge` is the next one, and `alpha` is the
    exponent (infinity if there is no tail).
    """

    values: Tensor
    tail: int
    edge: float
    alpha: float


def pl_alpha_hill(
    weight: Tensor, block: int = BLOCK, *, tail: float = TAIL, device: str = "cpu"
) -> float:
    """Return the tail exponent of a matrix `[N, K]` of any float dtype: above 1, without unit.

    FARMS pools the squared singular values of all whole `block` x `block` pieces at stride `block`
    (at most 256, else a sample with a fixed seed). A matrix with a side shorter than a block
    contributes its whole spectrum. The Hill estimator is `1 + k / sum(ln(top k / next one))` with
    `k = max(10, floor(tail * n))`, at most n - 1. The exponent is infinity for a matrix without a
    tail: all zeros, or a flat tail. For large matrices only the eigenvalues that the Hill estimator
    reads are computed, on `device`, "cpu" or "cuda", within 1e-3 of the exact exponent. Blocks that
    need all eigenvalues are solved on the CPU, on as many threads as torch uses: GPUs are no faster
    at this.

    Raises `InputError` for less than 2 rows or columns, numbers that are not finite, or a block or
    tail out of range. Raises `UnsupportedError` if there is no such device.
    """
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise UnsupportedError("there is no such device", expected="cpu, or cuda", got=device)
    with _one_thread_per_part() as map_parts:
        grid, _ = _block_grid(weight, block, tail)
        count = grid.shape[0] * grid.shape[1]
        k = tail_count(count * min(grid.shape[2:]), tail)
        if count >= FEW_BLOCKS and _is_worthwhile(block, tail):
            values = _leading_eigenvalues(grid, k, tail, map_parts, device)
            if values is not None:
                return _hill(values, k)
        return _hill(_sort_pool(_solve_blocks(grid.flatten(0, 1), map_parts)), k)


def spectrum(weight: Tensor, block: int = BLOCK, *, tail: float = TAIL) -> Spectrum:
    """Return the whole, exact pooled spectrum of a matrix `[N, K]`, and where its tail begins.

    For reports: it takes several times as long as `pl_alpha_hill`. It uses the same blocks and the
    same tail, and raises the same errors.
    """
    with _one_thread_per_part() as map_parts:
        grid, exponent = _block_grid(weight, block, tail)
        values = _sort_pool(_solve_blocks(grid.flatten(0, 1), map_parts))
    k = tail_count(values.numel(), tail)
    scaled = values * 2.0**exponent * 2.0**exponent
    return Spectrum(scaled, k, float(scaled[k]), _hill(values, k))


def tail_count(count: int, tail: float = TAIL) -> int:
    """Return how many of `count` eigenvalues the Hill estimator fits."""
    return min(max(MIN_TAIL, int(tail * count)), count - 1)


def check_options(block: int, tail: float) -> None:
    """Raise `InputError` for a block below 2 or a tail outside (0, 1)."""
    if block < 2:
        raise InputError("a block of a spectrum is too small", expected="2 or more", got=block)
    if not 0.0 < tail < 1.0:
        raise InputError(
            "the tail of a spectrum must be a share", expected="above 0, below 1", got=tail
        )


def _hill(values: Tensor, k: int) -> float:
    """Return Hill's exponent of the k largest of the sorted `values`; the next one is the edge."""
    largest = float(values[0])
    if largest <= 0.0:
        return math.inf
    floored = values.clamp(min=largest * FLOOR)
    logs = float((floored[:k] / floored[k]).log().sum())
    return math.inf if logs <= 0 else 1.0 + k / logs


def _block_grid(weight: Tensor, block: int, tail: float) -> tuple[Tensor, int]:
    """Return the whole blocks `[R, C, block, block]`, as a view if possible, and an exponent.

    The shape is `[1, 1, N, K]` if the matrix has no whole block. The blocks are the weights divided
    by 2^exponent. The exponent is 0 unless powers of the weights could overflow or underflow.
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
    grid = _split_blocks(weight, block)
    if abs(exponent) <= SAFE_EXPONENT:
        return grid, 0
    half_exponent = exponent // 2  # in two steps: 2^exponent may overflow float64
    return grid.double() * 2.0**-half_exponent * 2.0 ** (half_exponent - exponent), exponent


def _split_blocks(weight: Tensor, block: int) -> Tensor:
    if min(weight.shape) < block:
        return weight[None, None]
    grid = weight.unfold(0, block, block).unfold(1, block, block)
    if grid.shape[0] < grid.shape[1]:
        grid = grid.transpose(0, 1)  # threads split the first dimension
    count = grid.shape[0] * grid.shape[1]
    if count <= MAX_BLOCKS:
        return grid
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    sample = torch.randperm(count, generator=generator)[:MAX_BLOCKS]
    return _select_blocks(grid, sample).unsqueeze(1)


def _solve_blocks(pieces: Tensor, map_parts: MapParts) -> Tensor:
    """Return squared singular values of blocks `[P, N, K]`: float64 `[P, min(N, K)]`, ascending.

    They are computed as eigenvalues of the Gram matrices. In float64 these are as exact as an SVD
    in the tail, and faster.
    """
    return torch.cat(map_parts(_gram_eigenvalues, pieces))


def _gram_eigenvalues(pieces: Tensor) -> Tensor:
    pieces = pieces.double()
    if pieces.shape[1] > pieces.shape[2]:
        pieces = pieces.transpose(1, 2)
    values: Tensor = torch.linalg.eigvalsh(pieces @ pieces.transpose(1, 2))
    return values.clamp(min=0.0)


def _sort_pool(values: Tensor) -> Tensor:
    """Sort all values `[n]`, largest first; numpy sorts several times as fast as torch."""
    return torch.from_numpy(-np.sort(-values.flatten().numpy()))


def _is_worthwhile(block: int, tail: float) -> bool:
    """Return whether the leading Ritz values cost less than all eigenvalues of a block."""
    return block >= SMALL_BLOCK and 4 * ritz.subspace_size(block, tail) <= block


def _leading_eigenvalues(
    grid: Tensor, k: int, tail: float, map_parts: MapParts, device: str
) -> Tensor | None:
    """Return the eigenvalues of the tail and some below, pooled and sorted, float64, or None.

    The `k + 1` largest are those of the whole pool, within `ALPHA_ERROR`. Returns None if no filter
    can be designed from the pilots.
    """
    count = grid.shape[0] * grid.shape[1]
    pilots = torch.linspace(0, count - 1, PILOTS).long()
    full_spectra = _solve_blocks(_select_blocks(grid, pilots), map_parts)
    steepness = _hill(_sort_pool(full_spectra), tail_count(full_spectra.numel(), tail)) - 1
    if not math.isfinite(steepness):
        return None
    chebyshev = ritz.design(full_spectra.flip(-1), tail, ALPHA_ERROR / 4 / steepness**2)
    if chebyshev is None:
        return None
    if device == "cpu":
        ritz_values = ritz.join(map_parts(partial(ritz.leading, chebyshev=chebyshev), grid))
    else:
        ritz_values = ritz.leading(grid.to(device), chebyshev)
    values, checked = ritz_values.values.clone(), ritz_values.error.shape[1]
    values[:, :checked] *= 1 + ritz_values.error
    solved = torch.zeros(count, dtype=torch.bool)
    solved[pilots] = True
    failed = ~solved & torch.isinf(ritz_values.error).any(dim=1)
    while True:
        if bool(failed.any()):
            failed_spectra = _solve_blocks(
                _select_blocks(grid, failed.nonzero().flatten()), map_parts
            )
            full_spectra = torch.cat([full_spectra, failed_spectra])
            solved |= failed
        pool = _sort_pool(torch.cat([values[~solved].flatten(), full_spectra.flatten()]))
        failed = ~solved & _failed_blocks(values, ritz_values.error, solved, pool, k)
        if not bool(failed.any()):
            return pool


def _failed_blocks(values: Tensor, error: Tensor, solved: Tensor, pool: Tensor, k: int) -> Tensor:
    """Return which blocks `[P]` have Ritz values that are not exact enough for the tail of `pool`.

    These are blocks with too large an error, blocks with more tail values than have an error
    estimate, and blocks with a value so near the edge that their order is not known, because errors
    at the edge do not average out.
    """
    edge, steepness = float(pool[k]), _hill(pool, k) - 1
    allowed = ALPHA_ERROR / steepness**2  # alpha moves by (alpha - 1)^2 times the mean error
    checked = values[:, : error.shape[1]]
    tail_errors = torch.where(checked > NEAR * edge, error, 0.0)
    crowded = values[:, error.shape[1]] > NEAR * edge
    ambiguous = ((checked / edge - 1).abs() <= UNSURE * error).any(dim=1)
    failed = (tail_errors.amax(dim=1) > OUTLIER * allowed) | crowded | ambiguous
    accepted = ~failed & ~solved
    if float(tail_errors[accepted].sum()) > allowed * k:
        failed |= tail_errors.sum(dim=1) > allowed * k / len(values)
    return failed


def _select_blocks(grid: Tensor, indices: Tensor) -> Tensor:
    """Return the blocks `[P, n, n]` of a grid at `indices`, counted row by row."""
    columns = grid.shape[1]
    return grid[indices // columns, indices % columns]


@contextmanager
def _one_thread_per_part() -> Iterator[MapParts]:
    """Yield a function that maps over equal parts of the blocks, one part for each torch thread.

    Blocks are small: torch's own threads would start and stop in each operation, and waiting
    threads keep the processor busy. Therefore torch has one thread within the context.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield lambda function, blocks: [function(blocks)]
        return
    torch.set_num_threads(1)  # for this thread, and the default for new threads
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield lambda function, blocks: list(
                pool.map(function, blocks.split(-(-len(blocks) // threads)))
            )
    finally:
        torch.set_num_threads(threads)
