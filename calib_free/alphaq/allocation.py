"""AlphaQ's allocation (arXiv 2606.04980): a bit width for each expert matrix, from spectra alone.

Matrix l at b bits costs `(median(alpha) / alpha_l)^gamma * max(var_l, 1e-12) * 4^(-b)`. The sum of
costs is minimised under a mean bit width in which each matrix counts once. This is a 0/1 program,
and it is solved exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfmc.calib_free.alphaq.bit_widths import choose_widths
from lfmc.calib_free.alphaq.spectra import BLOCK, TAIL, check_options
from lfmc.errors import InputError

MIN_VARIANCE = 1e-12
BITS = (2, 3, 4, 8)  # the paper's widths
MAX_GAMMA = 100.0  # far above the paper's 10; sensitivities up to this power stay finite


@dataclass(frozen=True)
class AlphaQOptions:
    """The options of the paper, with its values as defaults.

    `gamma` is the power of the sensitivity. `bits` are the candidate bit widths; None means those
    of 2, 3, 4 and 8 that the target supports. `block` is the side of the blocks whose spectra are
    pooled. `tail` is the share of the pool that the exponent is fitted to. Raises `InputError` for
    a value out of range.
    """

    gamma: float = 1.0
    bits: tuple[int, ...] | None = None
    block: int = BLOCK
    tail: float = TAIL

    def __post_init__(self) -> None:
        check_options(self.block, self.tail)
        if not 0.0 <= self.gamma <= MAX_GAMMA:
            raise InputError(
                "AlphaQ's gamma is out of range", expected=f"0 to {MAX_GAMMA:g}", got=self.gamma
            )
        bits = self.bits
        if bits is not None and (
            len(set(bits)) != len(bits) or not bits or not _valid_widths(bits)
        ):
            raise InputError(
                "AlphaQ's bit widths are not valid",
                expected="different integers from 1 to 8",
                got=", ".join(map(str, bits)) or "none",
            )


def _valid_widths(bits: Sequence[int]) -> bool:
    return all(isinstance(width, int) and 1 <= width <= 8 for width in bits)


def sensitivities(alphas: Sequence[float], gamma: float) -> NDArray[np.float64]:
    """Return `(median(alpha) / alpha)^gamma`, float64 `[L]`; 0 where alpha is infinite (no tail).

    Raises `InputError` if most matrices have no tail, or an alpha is not positive.
    """
    values = np.asarray(alphas, dtype=np.float64)
    if np.isnan(values).any() or (values <= 0).any():
        raise InputError("a tail exponent is not a positive number", got=list(alphas)[:8])
    median = float(np.median(values)) if len(values) else 1.0
    if not math.isfinite(median):
        raise InputError(
            "most matrices have no tail in their spectrum: the checkpoint looks empty",
            todo="use --bits auto or uniform",
        )
    powers: NDArray[np.float64] = (median / values) ** gamma
    return powers


def allocate(
    alphas: Sequence[float],
    variances: Sequence[float],
    candidate_bits: Sequence[int],
    mean_bits: float,
    gamma: float = 1.0,
) -> list[int]:
    """Return bit widths of L matrices of one size, with a mean of at most `mean_bits`.

    Widths come from `candidate_bits`. `alphas` are tail exponents, `variances` population variances
    of the weights, and `gamma` is the power of the sensitivity. Raises `InputError` for lists of
    different lengths, no candidates, or a mean below the narrowest candidate. Raises `GateError` if
    the solver can't prove an optimum: there is no silent fallback.
    """
    widths = sorted(set(candidate_bits))
    if len(alphas) != len(variances) or not widths or widths[0] < 1:
        raise InputError(
            "AlphaQ needs one variance per tail exponent, and candidate bit widths",
            got=f"{len(alphas)} exponents, {len(variances)} variances, widths {widths}",
        )
    count = len(alphas)
    if not count:
        return []
    total = math.floor(mean_bits * count + 1e-9)
    if total < widths[0] * count:
        raise InputError(
            "the mean width is below the narrowest candidate",
            expected=f"at least {widths[0]} bits",
            got=f"{mean_bits} bits",
        )
    weights = sensitivities(alphas, gamma) * np.maximum(np.asarray(variances), MIN_VARIANCE)
    return choose_widths(weights.tolist(), [1] * count, widths, total)
