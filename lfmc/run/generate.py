"""Greedy or sampled continuation with any stepper, and the golden prompts of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lfmc.errors import GateError
from lfmc.run.stepper import Stepper

# Plain text, a question, and one short word: three lengths of prompt, two of them below a chunk.
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
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Up to `count` tokens after `prompt`, from a fresh conversation; ends before a stop id.

    Greedy at `temperature` 0, else sampled with a generator seeded by `seed`.
    """
    stepper.reset()
    generator = torch.Generator().manual_seed(seed)
    logits = stepper.step(prompt)[-1]
    for index in range(min(count, stepper.context - len(prompt))):
        if temperature > 0:
            shares = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(shares, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token in stop_ids:
            return
        yield token
        if index + 1 < count:
            logits = stepper.step([token])[-1]


def golden_prompts(stepper: Stepper, tokenizer: Any, bos_id: int | None) -> list[dict[str, Any]]:
    """Prompts and the tokens that this artifact continues them with, greedily.

    An app can run them on its device: other tokens mean that something there is wrong. `margin` is
    the smallest lead of a token over the next best; where it is tiny, a device that rounds
    otherwise may honestly differ.
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
    """Raise `GateError` where the artifact continues a golden prompt otherwise than it did."""
    for entry in golden:
        tokens, _ = _greedy(stepper, entry["prompt"], len(entry["tokens"]))
        if tokens != entry["tokens"]:
            raise GateError(
                "a golden prompt continues otherwise than when it was exported",
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
        best = logits.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        if index + 1 < count:
            logits = stepper.step(tokens[-1:])[-1]
    return tokens, margin
