"""Which experts tokens chose, and how narrowly: a rounding may turn a near tie.

From a turned choice on, a conversation goes another way: another expert's result is in the states.
Parity counts these tokens apart, and takes a turned choice for a fault where it was no near tie.
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

# What the scores of two experts may differ by for a choice between them to be turned: float32
# arithmetic in another order, and activations rounded to float16 or int8.
NEAR_TIE = 1e-5
NEAR_TIE_SHIPPED = 2e-3


@dataclass(frozen=True)
class Choice:
    """Experts of `T` tokens in `L` layers, int64 `[L, T, k]` in ascending order.

    `margins` `[L, T]` is by how much the last of them led the first that was not chosen; None where
    whoever ran the model can't tell.
    """

    experts: Tensor
    margins: Tensor | None = None


@runtime_checkable
class Choosing(Protocol):
    """A stepper that tells what the tokens of its last step chose, if there was a choice."""

    choice: Choice | None


def joined(choices: Sequence[Choice]) -> Choice:
    """The choices of one step after another."""
    margins = [choice.margins for choice in choices if choice.margins is not None]
    return Choice(
        torch.cat([choice.experts for choice in choices], dim=1),
        torch.cat(margins, dim=1) if margins else None,
    )


def first_turned(ours: Choice, reference: Choice) -> tuple[int, float] | None:
    """The first token with other experts, and the reference's margin where it went another way."""
    differs = (ours.experts != reference.experts).any(-1)  # (L, T)
    turned = differs.any(0).nonzero()
    if not len(turned):
        return None
    token = int(turned[0])
    layer = int(differs[:, token].nonzero()[0])
    margins = reference.margins
    return token, float("inf") if margins is None else float(margins[layer, token])


class ChoosingStepper(TorchStepper):
    """A `TorchStepper` that notes what `lfm::moe` chooses from."""

    choice: Choice | None = None

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        with _Noting() as noted:
            logits = super().step(tokens)
        self.choice = noted.choice()
        return logits


class _Noting(TorchDispatchMode):
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

    def choice(self) -> Choice | None:
        """What was noted, layer by layer."""
        if not self._experts:
            return None
        return Choice(torch.stack(self._experts), torch.stack(self._margins))
