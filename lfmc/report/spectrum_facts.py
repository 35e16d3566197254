"""Spectra of matrices for a page, limited to a few points each and to a number of matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.alphaq.spectra import spectrum
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.report.tensor_labels import place

POINTS = 64  # per spectrum
MAX_MATRICES = 3000  # matrices that a page shows in full, at about 1.3 KB each


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues at some ranks (from 1), relative to the largest, and the fitted tail.

    The matrix has `count` eigenvalues. The `tail` largest are above `edge` (relative to the
    largest, too) and follow a power law of exponent `alpha`, which is infinite without a tail.
    """

    ranks: tuple[int, ...]
    shares: tuple[float, ...]
    count: int
    tail: int
    edge: float
    alpha: float

    @property
    def tail_top(self) -> float:
        """The fitted tail at rank 1: `edge * tail^(1 / (alpha - 1))`."""
        return float(self.edge * self.tail ** (1 / (self.alpha - 1)))


def spectrum_of(weight: Tensor) -> Spectrum:
    """Return the spectrum of a matrix `[N, K]` of any float dtype, with N >= 2 and K >= 2."""
    exact = spectrum(weight)
    values = exact.values
    largest = max(float(values[0]), 1e-300)
    last = torch.tensor(float(len(values))).log()
    points = torch.linspace(0, float(last), POINTS).exp().round().long().clamp(1, len(values))
    ranks = tuple(dict.fromkeys(points.tolist()))
    shares = tuple(float(values[rank - 1]) / largest for rank in ranks)
    return Spectrum(ranks, shares, len(values), exact.tail, exact.edge / largest, exact.alpha)


def spectra_of(
    checkpoint: Checkpoint, names: Sequence[str], progress: Callable[[str], None]
) -> dict[str, Spectrum]:
    """Return the spectra of the named matrices with at least 2 rows and 2 columns."""
    spectra = {}
    for name in names:
        if min(checkpoint.tensors[name].shape) >= 2:
            progress(f"spectra: {name}")
            spectra[name] = spectrum_of(checkpoint.load(name))
    return spectra


def select_for_display(
    spectra: Mapping[str, Spectrum], limit: int = MAX_MATRICES
) -> tuple[list[str], str | None]:
    """Return the matrices that a page shows in full, and the rule of the selection.

    Up to `limit` matrices, the page shows all and the rule is None. Above, it shows all matrices
    outside the experts. For each layer and each matrix of an expert (w1, w2, w3), it shows the
    experts with the lowest, the median and the highest alpha.
    """
    if len(spectra) <= limit:
        return list(spectra), None
    experts: dict[tuple[str, int | None], list[str]] = {}
    selection = set()
    for name in spectra:
        where = place(name)
        if where.expert is None:
            selection.add(name)
        else:
            experts.setdefault((where.kind, where.layer), []).append(name)
    for names in experts.values():
        by_alpha = sorted(names, key=lambda name: spectra[name].alpha)
        selection |= {by_alpha[0], by_alpha[len(by_alpha) // 2], by_alpha[-1]}
    rule = (
        f"The model has {len(spectra):,} matrices. This page shows all matrices outside the "
        "experts. For each layer and each matrix of an expert, it shows the experts with the "
        "lowest, the median and the highest alpha."
    )
    return [name for name in spectra if name in selection], rule
