"""Quality of a quantized model on text: KL divergence, top-1 agreement and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lfmc.errors import InputError
from lfmc.model import Decoder, initial_state


@dataclass(frozen=True)
class Quality:
    """A model compared with its reference on the same tokens.

    `kl` is KL(reference || model) in nats per token. `top1` is the share of positions with the same
    most likely token. The perplexities are those of the next tokens of the text. `tokens` is the
    number of positions: `kl` and `top1` are means over all of them, the perplexities over those
    with a next token.
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int


@dataclass
class QualityMeter:
    """Accumulates `Quality` over batches in float64; its memory does not grow with the tokens."""

    _kl: float = 0.0
    _agreed: int = 0
    _tokens: int = 0
    _loss: float = 0.0
    _reference_loss: float = 0.0
    _targets: int = field(default=0)

    def add(self, reference: Tensor, logits: Tensor, tokens: Tensor) -> None:
        """Add logits `[B, T, V]` of both models on `tokens` `[B, T]`; raises `ValueError`."""
        if reference.shape != logits.shape or tokens.shape != logits.shape[:2]:
            raise ValueError(
                f"logits {list(reference.shape)} and {list(logits.shape)} do not fit each other "
                f"or tokens {list(tokens.shape)}"
            )
        for reference_row, row, ids in zip(reference, logits, tokens, strict=True):
            p, q = reference_row.double().log_softmax(-1), row.double().log_softmax(-1)  # (T, V)
            self._kl += float((p.exp() * (p - q)).sum())
            self._agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            self._tokens += ids.numel()
            next_ids = ids[1:].unsqueeze(-1)
            self._reference_loss -= float(p[:-1].gather(1, next_ids).sum())
            self._loss -= float(q[:-1].gather(1, next_ids).sum())
            self._targets += next_ids.numel()

    def result(self) -> Quality:
        """Return the quality over all added tokens; raise `ValueError` if there are none."""
        if not self._tokens:
            raise ValueError("no tokens were compared")
        targets = max(self._targets, 1)
        return Quality(
            kl=self._kl / self._tokens,
            top1=self._agreed / self._tokens,
            perplexity=math.exp(self._loss / targets),
            reference_perplexity=math.exp(self._reference_loss / targets),
            tokens=self._tokens,
        )


def compare(reference: Tensor, logits: Tensor, tokens: Tensor) -> Quality:
    """Compare logits `[B, T, V]` with reference logits `[B, T, V]` on `tokens` `[B, T]`."""
    meter = QualityMeter()
    meter.add(reference, logits, tokens)
    return meter.result()


def logits_of(decoder: Decoder, tokens: Tensor, batch: int = 8) -> Iterator[Tensor]:
    """Yield logits `[B, T, V]` for `tokens` `[N, T]`, at most `batch` texts at a time."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    for start in range(0, len(tokens), batch):
        texts = tokens[start : start + batch]
        states = initial_state(decoder.config, len(texts), tokens.shape[1], tokens.device)
        yield decoder(texts, positions, states)[0]


def windows(tokenizer: Any, text: str, length: int, count: int, bos_id: int | None) -> Tensor:
    """Return `count` windows of `text`, spread evenly over it: int64 `[count, length]`.

    If the model has a `bos_id`, it replaces the first token of each window. Raises `InputError` if
    the text is too short for that many windows without overlap.
    """
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
    if len(ids) < length * count:
        raise InputError(
            "the text is too short",
            expected=f"{count} windows of {length} tokens",
            got=f"{len(ids)} tokens",
            todo="use a longer text, or fewer or shorter windows",
        )
    starts = [(len(ids) - length) * i // max(count - 1, 1) for i in range(count)]
    pieces = torch.stack([ids[start : start + length] for start in starts])
    if bos_id is not None:
        pieces[:, 0] = bos_id
    return pieces
