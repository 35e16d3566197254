"""Text that a model writes by itself: the only data that a plan may look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lfmc.errors import UnsupportedError
from lfmc.model import Decoder, initial_state

# Texts written side by side: bounds the memory of their states. A GPU wants many.
BATCH = {"cpu": 256, "cuda": 2048}


def sample(decoder: Decoder, count: int, length: int, seed: int, varied: int = 0) -> Tensor:
    """`count` texts of `length` tokens, int64 `[count, length]`, at temperature 1.

    Each begins with the model's start token, which is part of it, and is continued one token at a
    time through the decoder's states; an end token does not stop it. The second token of the
    first `varied` texts is any of the vocabulary, which makes texts that the model would rarely
    begin. The same seed gives the same text on the same kind of device, where the decoder is and
    the text will be. Raises `UnsupportedError` for a model without a start token.
    """
    start = decoder.config.bos_id
    if start is None:
        raise UnsupportedError(
            "the model has no start token, so no text can be sampled from it",
            where="config.json, bos_token_id",
            todo="use --bits uniform or a plain width",
        )
    device = decoder.model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.full((count, length), start, device=device)
    batch = BATCH[device.type]
    with torch.inference_mode():
        for first in range(0, count, batch):
            _continue(decoder, tokens[first : first + batch], max(0, varied - first), generator)
    return tokens.clone()  # out of inference mode, so that it may take part in training


def _continue(decoder: Decoder, tokens: Tensor, varied: int, generator: torch.Generator) -> None:
    """Write all but the first column of `tokens` `[B, T]`."""
    count, length = tokens.shape
    states = list(initial_state(decoder.config, count, length, tokens.device))
    for position in range(length - 1):
        now = tokens[:, position : position + 1]
        logits, states = decoder(now, torch.tensor([position], device=tokens.device), states)
        shares = logits[:, 0].double().softmax(-1)
        chosen = torch.multinomial(shares, 1, generator=generator)[:, 0]
        if position == 0 and varied:
            anything = torch.ones_like(shares[:varied])
            chosen[:varied] = torch.multinomial(anything, 1, generator=generator)[:, 0]
        tokens[:, position + 1] = chosen


def logits_of(decoder: Decoder, tokens: Tensor, batch: int = 8) -> Iterator[Tensor]:
    """Logits `[B, T, V]` for `tokens` `[N, T]`, at most `batch` texts at a time."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        states = initial_state(decoder.config, len(part), tokens.shape[1], tokens.device)
        yield decoder(part, positions, states)[0]
