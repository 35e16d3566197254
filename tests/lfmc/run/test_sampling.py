"""Sampling settings: the logits equal those of transformers' processors, in their order."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lfmc.checkpoint.checkpoint import demo_path
from lfmc.errors import InputError
from lfmc.run.sampling import GREEDY, Sampling, choose_sampling, choose_token, process_logits
from tests.factories import reference_model

TOKENS = [3, 17, 3, 40]


def logits(seed: int) -> Tensor:
    return 4 * torch.randn(50, generator=torch.Generator().manual_seed(seed))


def processors(sampling: Sampling) -> LogitsProcessorList:
    """The processors of transformers for a sampling, in the order that transformers uses."""
    steps: list[Any] = [RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))]
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(steps)


SETTINGS = [
    Sampling(*values)
    for values in product((0.3, 1.0, 2.0), (None, 5), (None, 0.8), (None, 0.1), (1.0, 1.3))
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_logits_equal_those_of_transformers(sampling: Sampling) -> None:
    for seed in range(3):
        expected = processors(sampling)(torch.tensor([TOKENS]), logits(seed).unsqueeze(0))[0]
        actual = process_logits(logits(seed), TOKENS, sampling)
        assert torch.equal(actual.isinf(), expected.isinf())
        assert torch.allclose(actual, expected)


def test_the_order_is_that_of_transformers() -> None:
    """transformers builds its own list for a generation; ours has the same classes in order."""
    sampling = Sampling(0.7, 5, 0.9, 0.05, 1.1)
    model = reference_model(demo_path())
    config = GenerationConfig(do_sample=True, **asdict(sampling))
    theirs = model._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    assert [type(step) for step in theirs] == [type(step) for step in processors(sampling)]


@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.999, 1.0])
def test_extremes_of_top_p(top_p: float) -> None:
    expected = TopPLogitsWarper(top_p)(torch.tensor([TOKENS]), logits(0).unsqueeze(0))[0]
    assert torch.equal(process_logits(logits(0), [], Sampling(1.0, top_p=top_p)), expected)


def test_ties_at_the_limit_of_top_k_stay() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    kept = process_logits(scores, [], Sampling(1.0, top_k=2)).isfinite()
    assert kept.tolist() == [False, True, True, True, False]


def test_greedy_is_the_largest_logit_after_the_repetition_penalty() -> None:
    scores, generator = torch.tensor([1.0, 2.0, 1.9]), torch.Generator()
    assert choose_token(scores, [1], GREEDY, generator) == 1
    assert choose_token(scores, [1], Sampling(repetition_penalty=1.5), generator) == 2


def test_the_logits_of_the_model_are_not_changed() -> None:
    scores = logits(0)
    process_logits(scores, TOKENS, Sampling(0.5, 5, 0.9, 0.1, 1.3))
    assert torch.equal(scores, logits(0))


# Defaults ------------------------------------------------------------------------------------


def test_a_bundle_without_settings_is_greedy() -> None:
    assert choose_sampling(None) == choose_sampling({}) == GREEDY


def test_the_settings_of_a_bundle_are_defaults() -> None:
    recommended = {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05}
    assert choose_sampling(recommended) == Sampling(0.3, None, None, 0.15, 1.05)
    assert choose_sampling(recommended, min_p=0.2, top_k=7) == Sampling(0.3, 7, None, 0.2, 1.05)
    assert choose_sampling({"top_k": 5}) == Sampling(1.0, 5)


def test_temperature_0_is_greedy_whatever_the_bundle_recommends() -> None:
    assert choose_sampling({"temperature": 0.3, "top_k": 5}, temperature=0.0).is_greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range_are_errors(name: str, value: float) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, name: value}
    with pytest.raises(InputError, match=name):
        choose_sampling(None, **settings)
    with pytest.raises(InputError, match="can't be used"):
        choose_sampling(settings)


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_limit_of_sampling_at_temperature_0_is_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="has no effect at temperature 0"):
        choose_sampling(None, **settings)
    with pytest.raises(InputError, match="has no effect at temperature 0"):
        choose_sampling({"temperature": 0.7}, temperature=0.0, **settings)


def test_settings_of_a_bundle_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(InputError, match="can't be used"):
        choose_sampling({"temperature": "hot"})
