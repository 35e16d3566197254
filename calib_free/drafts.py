"""Text from a model that is too large to write token by token.

Sampling is `next = argmax(logits + noise)` with Gumbel noise. With the noise drawn beforehand, a
text is a fixed point: the one whose every token is what its own prefix and noise give. Iterating
all positions at once (Jacobi; Song et al. 2021, "Accelerating feedforward computation via parallel
nonlinear equation solving") settles at least one more token a pass, and a pass reads every weight
once for all tokens, where writing token by token reads them once a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lfmc.calib_free.streamed import StreamedDecoder
from lfmc.errors import UnsupportedError


def draft(
    decoder: StreamedDecoder,
    count: int,
    length: int,
    passes: int,
    seed: int,
    progress: Callable[[str], None],
) -> Tensor:
    """`count` texts of `length` tokens, int64 `[count, length]`, near samples at temperature 1.

    Each begins with the model's start token and goes on with tokens drawn evenly from the
    vocabulary, which `passes` passes replace; after them at least so many tokens of each text are
    exact samples. Raises `UnsupportedError` for a model without a start token.
    """
    start = decoder.config.bos_id
    if start is None:
        raise UnsupportedError(
            "the model has no start token, so no text can be sampled from it",
            where="config.json, bos_token_id",
            todo="use --bits uniform or a plain width",
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(decoder.config.vocab_size, (count, length), generator=generator)
    tokens[:, 0] = start
    for index in range(passes):
        progress(f"text from the model: pass {index + 1} of {passes}")
        tokens[:, 1:] = _next(decoder, tokens, seed)[:, :-1]
    return tokens


@torch.no_grad()
def _next(decoder: StreamedDecoder, tokens: Tensor, seed: int) -> Tensor:
    """The token after each of `tokens` `[B, T]`, with noise that depends on the seed alone."""
    x = decoder.embed(tokens)
    for index in range(decoder.config.num_layers):
        x = decoder.layer(index, x)
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty_like(tokens)
    for part, logits, _ in decoder.logits(decoder.normalized(x)):
        found[part] = choose(logits.flatten(0, 1), generator).view_as(tokens[part])
    return found


def choose(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row of logits `[n, V]`, int64 `[n]`, at temperature 1.

    `argmax(p / q)` with q exponential is `argmax(logits + Gumbel noise)`.
    """
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return logits.softmax(-1).div_(noise).argmax(-1)
