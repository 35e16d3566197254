"""Generates tokens with any stepper; golden prompts of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lfmc.errors import GateError
from lfmc.run.sampling import GREEDY, Sampling, choose_token
from lfmc.run.stepper import Stepper

# Text, a question and one short word: prompts of three lengths, two of them below one chunk.
GOLDEN_TEXTS = (
    "It was the best of times, it was",
    "The capital of France is",
    "def",
)
GOLDEN_TOKENS = 16


def continue_tokens(
    stepper: Stepper,
    prompt: Sequence[int],
    count: int,
    stop_ids: Sequence[int] = (),
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `count` tokens after `prompt`, from a cleared state; end before a stop id.

    It also ends when prompt and tokens fill the context. `seed` is of the sampling.
    """
    stepper.reset()
    generator = torch.Generator().manual_seed(seed)
    logits = stepper.step(prompt)[-1]
    tokens, num_tokens = list(prompt), min(count, stepper.context - len(prompt))
    for index in range(num_tokens):
        token = choose_token(logits, tokens, sampling, generator)
        if token in stop_ids:
            return
        tokens.append(token)
        yield token
        if index + 1 < num_tokens:
            logits = stepper.step([token])[-1]


def golden_prompts(stepper: Stepper, tokenizer: Any, bos_id: int | None) -> list[dict[str, Any]]:
    """Return prompts and their greedy continuations by this artifact.

    An app can run these prompts on a device; different tokens indicate an error. `margin` is the
    smallest logit difference between a chosen token and the next best. If it is tiny, a device with
    different rounding may return another token without an error.
    """
    golden = []
    for text in GOLDEN_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        prompt = ([] if bos_id is None else [bos_id]) + ids
        prompt = prompt[: max(1, stepper.context - GOLDEN_TOKENS)]
        tokens, margin = _greedy(stepper, prompt, min(GOLDEN_TOKENS, stepper.context - len(prompt)))
        golden.append(
            {
                "text": text,
                "prompt": prompt,
                "tokens": tokens,
                "margin": margin,
                "continuation": tokenizer.decode(tokens),
            }
        )
    return golden


def check_golden(stepper: Stepper, golden: Sequence[dict[str, Any]]) -> None:
    """Raise `GateError` if a golden prompt continues differently than at export."""
    for entry in golden:
        tokens, _ = _greedy(stepper, entry["prompt"], len(entry["tokens"]))
        if tokens != entry["tokens"]:
            raise GateError(
                "a golden prompt continues differently than at export",
                where=repr(entry["text"]),
                expected=entry["tokens"],
                got=tokens,
                todo=f"the smallest margin was {entry['margin']:.3g}; a large one means a fault",
            )


def _greedy(stepper: Stepper, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    stepper.reset()
    logits = stepper.step(prompt)[-1]
    tokens: list[int] = []
    margin = float("inf")
    for index in range(count):
        top = logits.topk(2)
        margin = min(margin, float(top.values[0] - top.values[1]))
        tokens.append(int(top.indices[0]))
        if index + 1 < count:
            logits = stepper.step(tokens[-1:])[-1]
    return tokens, margin
