"""The experts that tokens choose, and the margins of their choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertChoice:
    """The chosen experts of `T` tokens in `L` layers, int64 `[L, T, k]` in ascending order.

    `margins` `[L, T]` is the score of the last chosen expert minus that of the best expert that was
    not chosen; None if the runtime does not return scores.
    """

    experts: Tensor
    margins: Tensor | None = None


@runtime_checkable
class RecordsExpertChoice(Protocol):
    """A stepper that records the experts chosen in its last step; None if there are no experts."""

    choice: ExpertChoice | None


def choice_of_scores(scores: Sequence[Tensor], count: int) -> ExpertChoice | None:
    """Return the `count` best experts of each layer's scores `[T, E]`.

    Returns None if there are no layers, or if every token runs all experts.
    """
    if not scores or count >= scores[0].shape[-1]:
        return None
    ranked = [layer.topk(count + 1, dim=-1) for layer in scores]
    return ExpertChoice(
        torch.stack([order[:, :count].sort(-1).values for _, order in ranked]),
        torch.stack([values[:, -2] - values[:, -1] for values, _ in ranked]),
    )


def concat_choices(choices: Sequence[ExpertChoice]) -> ExpertChoice:
    """Concatenate the choices of consecutive steps."""
    margins = [choice.margins for choice in choices if choice.margins is not None]
    return ExpertChoice(
        torch.cat([choice.experts for choice in choices], dim=1),
        torch.cat(margins, dim=1) if margins else None,
    )
