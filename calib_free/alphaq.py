"""AlphaQ's allocation (arXiv 2606.04980): a width for every expert matrix, from spectra alone.

Matrix l at b bits costs `(median(alpha) / alpha_l)^gamma * max(var_l, 1e-12) * 4^(-b)`; the sum
is minimised under a mean width, each matrix counting once. A 0/1 program, solved exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import (  # type: ignore[import-untyped]
    Bounds,
    LinearConstraint,
    milp,
)
from scipy.sparse import csr_matrix, eye, kron  # type: ignore[import-untyped]

from lfmc.calib_free.solve import solver_silent
from lfmc.errors import GateError, InputError

MIN_VARIANCE = 1e-12
# HiGHS stops within 1e-6 of the optimum, whatever the costs: so the largest cost is far above 1.
SCALE = 1e7


def sensitivities(alphas: Sequence[float], gamma: float) -> NDArray[np.float64]:
    """`(median(alpha) / alpha)^gamma`, float64 `[L]`; 0 for a matrix without a tail (infinity).

    Raises `InputError` where most matrices have no tail, or an alpha is not positive.
    """
    values = np.asarray(alphas, dtype=np.float64)
    if np.isnan(values).any() or (values <= 0).any():
        raise InputError("a tail exponent is not a positive number", got=list(alphas)[:8])
    middle = float(np.median(values)) if len(values) else 1.0
    if not math.isfinite(middle):
        raise InputError(
            "most matrices have no tail in their spectrum: the checkpoint looks empty",
            todo="use --bits auto or uniform",
        )
    shares: NDArray[np.float64] = (middle / values) ** gamma
    return shares


def allocate(
    alphas: Sequence[float],
    variances: Sequence[float],
    candidate_bits: Sequence[int],
    mean_bits: float,
    gamma: float = 1.0,
) -> list[int]:
    """Widths of L matrices of one size, from `candidate_bits`, with a mean of at most `mean_bits`.

    `alphas` are tail exponents, `variances` population variances of the weights, `gamma` the
    power of the sensitivity. Raises `InputError` for lists of different lengths, no candidates,
    or a mean below the narrowest; `GateError` if HiGHS does not prove an optimum: there is no
    silent fallback.
    """
    widths = sorted(set(candidate_bits))
    if len(alphas) != len(variances) or not widths or widths[0] < 1:
        raise InputError(
            "AlphaQ needs one variance a tail exponent, and widths to choose from",
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


def choose_widths(
    weights: Sequence[float], counts: Sequence[int], widths: Sequence[int], total: int
) -> list[int]:
    """A width for each of U units of `counts` matrices, at most `total` bits over all matrices.

    Minimises `sum(weights * 4^-bits)`, exactly. Raises `GateError` without a proven optimum.
    """
    scaled = SCALE * np.asarray(weights, dtype=np.float64) / max(max(weights), 1e-300)
    cost = np.outer(scaled, 4.0 ** (widths[0] - np.array(widths)))  # the largest is SCALE
    bits = np.outer(counts, widths).ravel()
    with solver_silent():
        result = milp(
            cost.ravel(),
            integrality=np.ones(cost.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(kron(eye(len(weights)), np.ones((1, len(widths)))), 1.0, 1.0),
                LinearConstraint(csr_matrix(bits), -np.inf, total),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if result.status != 0 or result.x is None:
        raise GateError("the solver found no optimal widths", where="HiGHS", got=result.message)
    picks = np.round(result.x).reshape(cost.shape).argmax(axis=1)
    return [widths[pick] for pick in picks]
