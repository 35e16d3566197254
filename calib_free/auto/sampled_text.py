"""Text that a model writes by itself, the only data that a plan may look at.

It is written with one matrix in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.errors import UnsupportedError
from lfmc.model import initial_state

# Texts written side by side: bounds the memory of their states. A GPU wants many.
BATCH = {"cpu": 256, "cuda": 2048}


@torch.no_grad()
def write_texts(
    decoder: StreamedDecoder,
    count: int,
    length: int,
    seed: int,
    progress: Callable[[str], None],
    varied: int = 0,
) -> Tensor:
    """`count` texts of `length` tokens, int64 `[count, length]`, at temperature 1.

    Each begins with the model's start token, which is part of it; an end token does not stop it.
    The second token of the first `varied` texts is any of the vocabulary, which makes texts that
    the model would rarely begin. Texts grow together by one token a pass, and a pass reads every
    weight. They are where the decoder is. Raises `UnsupportedError` for a model without a start
    token.
    """
    start = decoder.config.bos_id
    if start is None:
        raise UnsupportedError(
            "the model has no start token, so no text can be sampled from it",
            where="config.json, bos_token_id",
            todo="use --bits uniform or a plain width",
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((count, length), start, device=decoder.device)
    if length > 1 and varied:
        anything = torch.randint(decoder.config.vocab_size, (varied,), generator=generator)
        tokens[:varied, 1] = anything.to(decoder.device)
    batches = tokens.split(BATCH[decoder.device.type])
    for index, batch in enumerate(batches):
        part_of = f"part {index + 1} of {len(batches)}, " if len(batches) > 1 else ""
        states = initial_state(decoder.config, len(batch), length, decoder.device)
        begun = max(0, min(len(batch), varied - index * len(batches[0])))
        for position in range(length - 1):
            progress(f"text from the model: {part_of}token {position + 2} of {length}")
            here = torch.tensor([position], device=decoder.device)
            hidden, states = decoder.hidden(batch[:, position : position + 1], here, states)
            for part, logits, _ in decoder.logits(hidden):
                chosen = choose(logits[:, 0], generator)
                if position == 0:
                    given = max(0, min(len(chosen), begun - part.start))
                    chosen[:given] = batch[part, 1][:given]
                batch[part, position + 1] = chosen
    return tokens


def choose(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row of logits `[n, V]`, int64 `[n]`, at temperature 1.

    Where the running sum of probabilities passes a random share: one random number a token, from
    a generator on the CPU.
    """
    shares = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    points = points.to(logits.device) * shares[:, -1:]
    return torch.searchsorted(shares, points).squeeze(1).clamp(max=logits.shape[-1] - 1)
