"""Spectra of matrices, few enough points of each to draw, and of few enough matrices to send."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.alphaq.spectra import spectrum
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.report.tensor_labels import place

POINTS = 64  # of each spectrum
MOST = 3000  # matrices that a page shows in full; they take about 1.3 KB each


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues as shares of the largest, at some ranks (from 1), and the tail fitted to them.

    There are `count` eigenvalues; the `tail` largest of them are above `edge` (a share, too) and
    fall as a power law of exponent `alpha`, infinite where there is none.
    """

    ranks: tuple[int, ...]
    shares: tuple[float, ...]
    count: int
    tail: int
    edge: float
    alpha: float

    @property
    def fitted(self) -> float:
        """The largest eigenvalue, as the tail has it: `edge * tail^(1 / (alpha - 1))`."""
        return float(self.edge * self.tail ** (1 / (self.alpha - 1)))


def spectrum_of(weight: Tensor) -> Spectrum:
    """The spectrum of a matrix `[N, K]` of 2 rows and columns or more, of any float dtype."""
    found = spectrum(weight)
    values = found.values
    largest = max(float(values[0]), 1e-300)
    last = torch.tensor(float(len(values))).log()
    ranks = torch.linspace(0, float(last), POINTS).exp().round().long().clamp(1, len(values))
    kept = tuple(dict.fromkeys(ranks.tolist()))
    shares = tuple(float(values[rank - 1]) / largest for rank in kept)
    return Spectrum(kept, shares, len(values), found.tail, found.edge / largest, found.alpha)


def spectra_of(
    checkpoint: Checkpoint, names: Sequence[str], progress: Callable[[str], None]
) -> dict[str, Spectrum]:
    """Spectra of the named matrices; those of fewer than 2 rows or columns have none."""
    found = {}
    for name in names:
        if min(checkpoint.tensors[name].shape) >= 2:
            progress(f"spectra: {name}")
            found[name] = spectrum_of(checkpoint.load(name))
    return found


def shown(spectra: Mapping[str, Spectrum], most: int = MOST) -> tuple[list[str], str | None]:
    """Which matrices a page shows in full, and the rule, where they are not all of them.

    More than `most` matrices: all outside the experts, and of each layer's experts (of each of
    their matrices) the ones with the lowest, the median and the highest alpha.
    """
    if len(spectra) <= most:
        return list(spectra), None
    kinds: dict[tuple[str, int | None], list[str]] = {}
    kept = set()
    for name in spectra:
        where = place(name)
        if where.expert is None:
            kept.add(name)
        else:
            kinds.setdefault((where.kind, where.layer), []).append(name)
    for names in kinds.values():
        ordered = sorted(names, key=lambda name: spectra[name].alpha)
        kept |= {ordered[0], ordered[len(ordered) // 2], ordered[-1]}
    rule = (
        f"The model has {len(spectra):,} matrices. Shown in full are all outside the experts and, "
        "in every layer and for each of an expert's matrices, the experts of lowest, median and "
        "highest alpha."
    )
    return [name for name in spectra if name in kept], rule
