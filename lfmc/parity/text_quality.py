"""What quantization did to a model: KL divergence, top-1 agreement and perplexity on text."""

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
    """A model against its reference on the same tokens.

    `kl` is KL(reference || model) in nats per token, `top1` the share of positions whose most
    likely token is the same; the perplexities are of the text's own next tokens. `tokens` counts
    the positions: `kl` and `top1` are means over all, the perplexities over those with a next.
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int


@dataclass
class QualityMeter:
    """Adds up `Quality` over batches, in float64, so that any number of tokens fits in memory."""

    _kl: float = 0.0
    _agreed: int = 0
    _tokens: int = 0
    _loss: float = 0.0
    _reference_loss: float = 0.0
    _targets: int = field(default=0)

    def add(self, reference: Tensor, logits: Tensor, tokens: Tensor) -> None:
        """Logits `[B, T, V]` of both models on `tokens` `[B, T]`; a bad shape is `ValueError`."""
        if reference.shape != logits.shape or tokens.shape != logits.shape[:2]:
            raise ValueError(
                f"logits {list(reference.shape)} and {list(logits.shape)} do not fit each other "
                f"or tokens {list(tokens.shape)}"
            )
        for wide, narrow, row in zip(reference, logits, tokens, strict=True):
            p, q = wide.double().log_softmax(-1), narrow.double().log_softmax(-1)  # (T, V)
            self._kl += float((p.exp() * (p - q)).sum())
            self._agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            self._tokens += row.numel()
            following = row[1:].unsqueeze(-1)
            self._reference_loss -= float(p[:-1].gather(1, following).sum())
            self._loss -= float(q[:-1].gather(1, following).sum())
            self._targets += following.numel()

    def result(self) -> Quality:
        """The numbers so far; `ValueError` before any tokens were added."""
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
    """`Quality` of logits `[B, T, V]` against reference logits `[B, T, V]` on `tokens` `[B, T]`."""
    meter = QualityMeter()
    meter.add(reference, logits, tokens)
    return meter.result()


def logits_of(decoder: Decoder, tokens: Tensor, batch: int = 8) -> Iterator[Tensor]:
    """Logits `[B, T, V]` for `tokens` `[N, T]`, at most `batch` texts at a time."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        states = initial_state(decoder.config, len(part), tokens.shape[1], tokens.device)
        yield decoder(part, positions, states)[0]


def windows(tokenizer: Any, text: str, length: int, count: int, bos_id: int | None) -> Tensor:
    """`count` pieces of `text`, spread evenly over it: int64 `[count, length]`.

    Each begins with `bos_id`, where the model has one, in place of its first token. Raises
    `InputError` where the text is too short to give that many without overlap.
    """
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
    if len(ids) < length * count:
        raise InputError(
            "the text is too short",
            expected=f"{count} windows of {length} tokens",
            got=f"{len(ids)} tokens",
            todo="give more text, or ask for fewer or shorter windows",
        )
    starts = [(len(ids) - length) * i // max(count - 1, 1) for i in range(count)]
    pieces = torch.stack([ids[start : start + length] for start in starts])
    if bos_id is not None:
        pieces[:, 0] = bos_id
    return pieces
