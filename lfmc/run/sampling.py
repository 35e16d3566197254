"""Chooses the next token from logits, with the meaning that transformers gives to each setting.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lfmc.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy.

    `temperature` 0 takes the most likely token. Above 0, tokens are sampled from the `top_k` most
    likely ones, of these from the most likely ones that together have the probability `top_p`, and
    of these from the ones that are at least `min_p` times as likely as the most likely one. None
    leaves a limit out, and so does 0 for `top_k`. `repetition_penalty` divides positive logits and
    multiplies negative logits of the tokens in the conversation; 1 changes nothing. It also applies
    at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0.0, math.inf, self.temperature),
            "top_k": (0, math.inf, self.top_k),
            "top_p": (0.0, 1.0, self.top_p),
            "min_p": (0.0, 1.0, self.min_p),
        }
        for name, (low, high, value) in limits.items():
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
                raise InputError(f"{name} is out of range", expected=expected, got=value)
        penalty = self.repetition_penalty
        if not (penalty > 0 and math.isfinite(penalty)):
            raise InputError(
                "repetition_penalty is out of range", expected="more than 0", got=penalty
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()
SAMPLED_ONLY = ("top_k", "top_p", "min_p")  # settings without an effect at temperature 0


def choose_sampling(
    defaults: Mapping[str, Any] | None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Sampling:
    """Return the settings of a generation: those that are not None, then those of the bundle.

    `defaults` are the settings that a bundle recommends (`sampling` of its manifest). A bundle with
    settings but no temperature samples at temperature 1, as transformers does; a bundle without
    settings is greedy.

    Raises `InputError` for a value out of range, and for a limit of sampling at temperature 0.
    """
    arguments: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    values = {name: value for name, value in arguments.items() if value is not None}
    sampling = replace(_bundle_sampling(defaults), **values)
    ignored = [name for name in SAMPLED_ONLY if values.get(name)]
    if sampling.is_greedy and ignored:
        raise InputError(
            f"{', '.join(ignored)} has no effect at temperature 0, which takes the most likely "
            "token",
            todo="set a temperature above 0",
        )
    return sampling


def _bundle_sampling(defaults: Mapping[str, Any] | None) -> Sampling:
    """Return the settings that a bundle recommends."""
    if not defaults:
        return GREEDY
    names = {field.name for field in fields(Sampling)}
    settings = {name: value for name, value in defaults.items() if name in names}
    try:
        return Sampling(**{"temperature": 1.0, **settings})
    except (InputError, TypeError) as error:
        raise InputError(
            "the bundle recommends sampling settings that can't be used",
            where="sampling in manifest.json",
            got=dict(defaults),
        ) from error


def process_logits(logits: Tensor, tokens: Sequence[int], sampling: Sampling) -> Tensor:
    """Return the processed logits, float32 `[V]`; tokens that are left out have minus infinity.

    `logits` are float32 `[V]`, `tokens` are the ids of the conversation so far. At temperature 0,
    only the repetition penalty applies.
    """
    scores = logits
    if sampling.repetition_penalty != 1:
        scores = _penalize(scores, tokens, sampling.repetition_penalty)
    if sampling.is_greedy:
        return scores
    scores = scores / sampling.temperature
    if sampling.top_k:
        smallest = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if sampling.top_p is not None:
        scores = _keep_top_p(scores, sampling.top_p)
    if sampling.min_p is not None:
        probabilities = scores.softmax(-1)
        rare = probabilities < sampling.min_p * probabilities.max()
        scores = scores.masked_fill(rare, -torch.inf)
    return scores


def choose_token(
    logits: Tensor, tokens: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """Return the next token after `tokens`, from logits `[V]`."""
    scores = process_logits(logits, tokens, sampling)
    if sampling.is_greedy:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


def _penalize(scores: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Return scores `[V]` with those of `tokens` penalized (Keskar et al. 2019, section 4.1)."""
    ids = torch.tensor(sorted({token for token in tokens if token < len(scores)}))
    scores, values = scores.clone(), scores[ids]
    scores[ids] = torch.where(values < 0, values * penalty, values / penalty)
    return scores


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Leave out the least likely tokens, which together have a probability of at most 1 - top_p.

    The most likely token stays.
    """
    ascending, order = scores.sort()
    is_rare = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    is_rare[-1] = False
    return scores.masked_fill(torch.zeros_like(is_rare).scatter(0, order, is_rare), -torch.inf)
