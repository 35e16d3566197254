"""Changed expert choices: compared separately after near ties, an error otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lfmc.parity.compare import Case, Rung, compare
from lfmc.parity.expert_choices import find_changed_choice
from lfmc.run.conversation import SteppedModel
from lfmc.run.expert_choice import ExpertChoice, concat_choices

CASE = Case("all", (4, 2, 2))


class Router:
    """Returns logits `[T, 2]`; from token `changes_at` on, it chooses other experts."""

    context = 99

    def __init__(self, changes_at: int = 99, drift: float = 0.0, margin: float = 1e-4) -> None:
        self.changes_at, self.drift, self.margin = changes_at, drift, margin
        self.choice: ExpertChoice | None = None
        self.reset()

    def reset(self) -> None:
        self.length = 0

    def step(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(self.length, self.length + len(tokens))
        self.length += len(tokens)
        changed = (positions >= self.changes_at).long()
        experts = torch.stack([changed, changed + 2], dim=-1)[None]
        self.choice = ExpertChoice(experts, torch.full((1, len(tokens)), self.margin))
        return torch.ones(len(tokens), 2) + changed[:, None] + self.drift


def run(router: Router, reference: Router) -> Rung:
    models = SteppedModel(router), SteppedModel(reference)
    return compare(3, "routed", *models, [CASE], 9, tolerance=1e-2, near_tie=1e-3)


def test_tokens_after_a_changed_near_tie_are_compared_separately() -> None:
    (result,) = run(Router(changes_at=5), Router()).cases
    assert (result.difference, result.apart, result.difference_apart) == (0.0, 3, 1.0)
    assert run(Router(changes_at=5), Router()).passed


def test_tokens_before_the_change_have_to_agree() -> None:
    rung = run(Router(changes_at=5, drift=0.1), Router())
    assert not rung.passed
    assert rung.worst == pytest.approx(0.1)


def test_a_clear_choice_may_not_change() -> None:
    rung = run(Router(changes_at=5), Router(margin=0.2))
    assert not rung.passed
    assert rung.cases[0].apart == 0


def test_the_margin_is_that_of_the_first_changed_layer() -> None:
    actual = ExpertChoice(torch.tensor([[[0, 1], [0, 2]], [[3, 4], [3, 4]]]))
    expected = ExpertChoice(
        torch.tensor([[[0, 1], [0, 1]], [[3, 4], [2, 4]]]), torch.tensor([[0.5, 0.1], [0.5, 0.9]])
    )
    assert find_changed_choice(actual, expected) == (1, pytest.approx(0.1))
    assert find_changed_choice(expected, expected) is None
    assert concat_choices([expected, expected]).experts.shape == (2, 4, 2)
