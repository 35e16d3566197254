"""Turned choices of experts: counted apart where they were near ties, a fault where not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lfmc.parity.compare import Case, Rung, compare
from lfmc.parity.expert_choices import Choice, first_turned, joined

CASE = Case("all", (4, 2, 2))


class Router:
    """Logits `[T, 2]` and experts of one layer; from token `turns` on it goes another way."""

    def __init__(self, turns: int = 99, drift: float = 0.0, margin: float = 1e-4) -> None:
        self.turns, self.drift, self.margin = turns, drift, margin
        self.choice: Choice | None = None
        self.reset()

    def reset(self) -> None:
        self.length = 0

    def step(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(self.length, self.length + len(tokens))
        self.length += len(tokens)
        turned = (positions >= self.turns).long()
        experts = torch.stack([turned, turned + 2], dim=-1)[None]
        self.choice = Choice(experts, torch.full((1, len(tokens)), self.margin))
        return torch.ones(len(tokens), 2) + turned[:, None] + self.drift


def run(side: Router, reference: Router) -> Rung:
    return compare(3, "routed", side, reference, [CASE], 9, tolerance=1e-2, near_tie=1e-3)


def test_what_follows_a_turned_near_tie_is_counted_apart() -> None:
    (found,) = run(Router(turns=5), Router()).cases
    assert (found.difference, found.apart, found.difference_apart) == (0.0, 3, 1.0)
    assert run(Router(turns=5), Router()).passed


def test_what_comes_before_it_has_to_agree() -> None:
    rung = run(Router(turns=5, drift=0.1), Router())
    assert not rung.passed
    assert rung.worst == pytest.approx(0.1)


def test_a_choice_that_was_clear_may_not_turn() -> None:
    rung = run(Router(turns=5), Router(margin=0.2))
    assert not rung.passed
    assert rung.cases[0].apart == 0


def test_the_first_other_layer_tells_the_margin() -> None:
    ours = Choice(torch.tensor([[[0, 1], [0, 2]], [[3, 4], [3, 4]]]))
    theirs = Choice(
        torch.tensor([[[0, 1], [0, 1]], [[3, 4], [2, 4]]]), torch.tensor([[0.5, 0.1], [0.5, 0.9]])
    )
    assert first_turned(ours, theirs) == (1, pytest.approx(0.1))
    assert first_turned(theirs, theirs) is None
    assert joined([theirs, theirs]).experts.shape == (2, 4, 2)
