"""Text that a model writes for its own plan, with one of its matrices in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lfmc.calib_free.streamed import StreamedDecoder
from lfmc.errors import UnsupportedError
from lfmc.model import initial_state


@torch.no_grad()
def write_texts(
    decoder: StreamedDecoder, count: int, length: int, seed: int, progress: Callable[[str], None]
) -> Tensor:
    """`count` texts of `length` tokens, int64 `[count, length]`, at temperature 1.

    Each begins with the model's start token, which is part of it; an end token does not stop it.
    All grow together by one token a pass, and a pass reads every weight. Raises
    `UnsupportedError` for a model without a start token.
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
    states = initial_state(decoder.config, count, length)
    for position in range(length - 1):
        progress(f"text from the model: token {position + 2} of {length}")
        now = tokens[:, position : position + 1]
        hidden, states = decoder.hidden(now, torch.tensor([position]), states)
        for part, logits, _ in decoder.logits(hidden):
            tokens[part, position + 1] = choose(logits[:, 0], generator)
    return tokens


def choose(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row of logits `[n, V]`, int64 `[n]`, at temperature 1.

    Where the running sum of probabilities passes a random share: one random number a token.
    """
    shares = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * shares[:, -1:]
    return torch.searchsorted(shares, points).squeeze(1).clamp(max=logits.shape[-1] - 1)
