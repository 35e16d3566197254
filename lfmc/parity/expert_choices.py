"""Records which experts each token chooses, and by which margin.

Rounding can change the choice between two experts whose scores are nearly equal. From that token
on, the states contain the result of another expert, so all logits differ. Parity compares these
tokens separately. A choice that changes without a near tie is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lfmc.graph.ops  # noqa: F401  (registers the operators)
from lfmc.run.stepper import TorchStepper

# Largest difference of two experts' scores at which the choice between them may change: for float32
# arithmetic in a different order, and for activations rounded to float16 or int8.
NEAR_TIE = 1e-5
NEAR_TIE_SHIPPED = 2e-3


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


def concat_choices(choices: Sequence[ExpertChoice]) -> ExpertChoice:
    """Concatenate the choices of consecutive steps."""
    margins = [choice.margins for choice in choices if choice.margins is not None]
    return ExpertChoice(
        torch.cat([choice.experts for choice in choices], dim=1),
        torch.cat(margins, dim=1) if margins else None,
    )


def find_changed_choice(actual: ExpertChoice, reference: ExpertChoice) -> tuple[int, float] | None:
    """Return the first token whose experts differ from `reference`, and the margin of that choice.

    The margin is that of `reference` in the first layer that differs. Returns None if no choice
    differs.
    """
    differs = (actual.experts != reference.experts).any(-1)  # (L, T)
    changed_tokens = differs.any(0).nonzero()
    if not len(changed_tokens):
        return None
    token = int(changed_tokens[0])
    layer = int(differs[:, token].nonzero()[0])
    margins = reference.margins
    return token, float("inf") if margins is None else float(margins[layer, token])


class ExpertChoiceStepper(TorchStepper):
    """A `TorchStepper` that records the choices of every `lfm::moe` operator."""

    choice: ExpertChoice | None = None

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        with _ChoiceRecorder() as recorder:
            logits = super().step(tokens)
        self.choice = recorder.choice()
        return logits


class _ChoiceRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._experts: list[Tensor] = []
        self._margins: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.lfm.moe.default:
            scores, count = args[2], args[6]
            if count < scores.shape[-1]:
                values, order = scores.topk(count + 1, dim=-1)
                self._experts.append(order[:, :count].sort(-1).values)
                self._margins.append(values[:, -2] - values[:, -1])
        return func(*args, **(kwargs or {}))

    def choice(self) -> ExpertChoice | None:
        """Return the recorded choices of all layers; None if there are none."""
        if not self._experts:
            return None
        return ExpertChoice(torch.stack(self._experts), torch.stack(self._margins))
