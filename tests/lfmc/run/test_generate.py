"""Greedy and sampled continuation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfmc.run.generate import continue_tokens, golden_prompts
from lfmc.run.sampling import Sampling
from lfmc.run.timing import TimedStepper


class Counter:
    """Predicts the last token plus one, modulo 10."""

    context = 12

    def __init__(self) -> None:
        self.length = 0

    def reset(self) -> None:
        self.length = 0

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(tokens)
        self.length += len(ids)
        assert self.length <= self.context
        return 5.0 * torch.nn.functional.one_hot((ids + 1) % 10, 10).float()


def test_greedy_counts_up() -> None:
    assert list(continue_tokens(Counter(), [3], 4)) == [4, 5, 6, 7]


def test_it_ends_before_a_stop_id_and_at_the_context() -> None:
    assert list(continue_tokens(Counter(), [3], 9, stop_ids=[6])) == [4, 5]
    assert len(list(continue_tokens(Counter(), [1, 2, 3], 100))) == 9


def test_each_call_is_a_new_conversation() -> None:
    stepper = Counter()
    assert list(continue_tokens(stepper, [3], 8)) == list(continue_tokens(stepper, [3], 8))


def test_sampling_is_seeded() -> None:
    def draw(seed: int) -> list[int]:
        return list(continue_tokens(Counter(), [3], 8, sampling=Sampling(5.0), seed=seed))

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(6)}) > 1


def test_a_repetition_penalty_sees_prompt_and_new_tokens() -> None:
    sampling = Sampling(repetition_penalty=100.0)
    tokens = list(continue_tokens(Ranks(), [7, 1], 6, sampling=sampling))
    assert tokens == [9, 8, 6, 5, 4, 3]
    assert list(continue_tokens(Ranks(), [1, 0], 3)) == [9, 9, 9]


class Ranks(Counter):
    """Predicts 9, then 8, down to 0, whatever the tokens are."""

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        super().step(tokens)
        return (torch.arange(10.0) + 1).expand(len(tokens), 10)


def test_speed_is_measured_per_call() -> None:
    times = iter([0.0, 2.0, 10.0, 10.5, 20.0, 21.5])
    stepper = TimedStepper(Counter(), clock=lambda: next(times))
    assert (stepper.prefill, stepper.decode) == (None, None)
    assert list(continue_tokens(stepper, [1, 2, 3, 4], 3)) == [5, 6, 7]
    assert (stepper.prefill, stepper.decode) == (2.0, 1.0)  # 4 tokens in 2 s, 2 tokens in 2 s


def test_golden_prompts_have_their_margin() -> None:
    class FakeTokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> FakeTokenizer:
            self.ids = [len(text) % 10]
            return self

        def decode(self, tokens: list[int]) -> str:
            return "".join(map(str, tokens))

    golden = golden_prompts(Counter(), FakeTokenizer(), 1)
    assert [len(entry["tokens"]) for entry in golden] == [11, 11, 11]
    assert all(entry["margin"] == 5.0 for entry in golden)
    assert all(entry["prompt"][0] == 1 for entry in golden)
