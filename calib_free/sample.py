"""Text that a model writes by itself: the only data that a plan may look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lfmc.errors import UnsupportedError
from lfmc.model import Decoder, initial_state


def sample(decoder: Decoder, count: int, length: int, seed: int) -> Tensor:
    """`count` texts of `length` tokens, int64 `[count, length]`, at temperature 1.

    Each begins with the model's start token, which is part of it, and is continued one token at a
    time through the decoder's states; an end token does not stop it. The same seed gives the same
    text. Raises `UnsupportedError` for a model without a start token.
    """
    start = decoder.config.bos_id
    if start is None:
        raise UnsupportedError(
            "the model has no start token, so no text can be sampled from it",
            where="config.json, bos_token_id",
            todo="use --bits uniform or a plain width",
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((count, length), start)
    states = list(initial_state(decoder.config, count, length))
    with torch.inference_mode():
        for position in range(length - 1):
            now = tokens[:, position : position + 1]
            logits, states = decoder(now, torch.tensor([position]), states)
            shares = logits[:, 0].double().softmax(-1)
            tokens[:, position + 1] = torch.multinomial(shares, 1, generator=generator)[:, 0]
    return tokens


def logits_of(decoder: Decoder, tokens: Tensor, batch: int = 8) -> Iterator[Tensor]:
    """Logits `[B, T, V]` for `tokens` `[N, T]`, at most `batch` texts at a time."""
    positions = torch.arange(tokens.shape[1])
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        states = initial_state(decoder.config, len(part), tokens.shape[1])
        yield decoder(part, positions, states)[0]
