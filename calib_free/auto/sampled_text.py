"""Sample text from the model itself, the only data that a plan may use.

Sampling keeps one matrix in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.errors import UnsupportedError
from lfmc.model import initial_state

# Number of texts sampled in parallel: bounds the memory of states. A GPU needs many to be busy.
BATCH = {"cpu": 256, "cuda": 2048}


def sample_texts(
    decoder: StreamedDecoder,
    count: int,
    length: int,
    seed: int,
    progress: Callable[[str], None],
    varied: int = 0,
) -> Tensor:
    """Sample `count` texts of `length` tokens, int64 `[count, length]`, at temperature 1.

    Each text begins with the model's start token; an end token does not stop it. The second token
    of the first `varied` texts is drawn uniformly from the vocabulary, so that these texts have
    beginnings that the model would rarely sample. Each pass reads every weight and adds one token
    to every text. The result is on the decoder's device. Raises `UnsupportedError` for a model
    without a start token.
    """
    return _sample(decoder, count, length, seed, progress, varied, ())


def sample_texts_with_states(
    decoder: StreamedDecoder,
    count: int,
    length: int,
    seed: int,
    progress: Callable[[str], None],
) -> tuple[Tensor, list[Tensor]]:
    """Sample texts as `sample_texts` does; also return the hidden states of all their tokens.

    The states are float32 `[count, length, H]`, before the first layer and after each layer. They
    cost one more pass, for the last token, instead of a forward pass over all tokens.
    """
    shape, layers = (count, length, decoder.config.hidden_size), decoder.config.num_layers
    hidden = [torch.empty(shape, device=decoder.device) for _ in range(layers + 1)]
    return _sample(decoder, count, length, seed, progress, 0, hidden), hidden


@torch.no_grad()
def _sample(
    decoder: StreamedDecoder,
    count: int,
    length: int,
    seed: int,
    progress: Callable[[str], None],
    varied: int,
    hidden: Sequence[Tensor],
) -> Tensor:
    """Sample texts; write the hidden states of all tokens to `hidden`, unless it is empty."""
    start_id = decoder.config.bos_id
    if start_id is None:
        raise UnsupportedError(
            "the model has no start token, so no text can be sampled from it",
            where="config.json, bos_token_id",
            todo="use --bits uniform or a fixed width",
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((count, length), start_id, device=decoder.device)
    if length > 1 and varied:
        random_ids = torch.randint(decoder.config.vocab_size, (varied,), generator=generator)
        tokens[:varied, 1] = random_ids.to(decoder.device)
    size = BATCH[decoder.device.type]
    batches = tokens.split(size)
    for index, batch in enumerate(batches):
        part_name = f"part {index + 1} of {len(batches)}, " if len(batches) > 1 else ""
        states = initial_state(decoder.config, len(batch), length, decoder.device)
        batch_varied = max(0, min(len(batch), varied - index * size))
        recorded = [layer[index * size : index * size + len(batch)] for layer in hidden]
        for position in range(length if hidden else length - 1):
            progress(
                f"text from the model: {part_name}token {min(position + 2, length)} of {length}"
            )
            positions = torch.tensor([position], device=decoder.device)
            inputs, states = decoder.hidden(
                batch[:, position : position + 1],
                positions,
                states,
                partial(_record, recorded, position),
            )
            if position == length - 1:
                break
            for part, logits, _ in decoder.logits(inputs):
                next_ids = sample_tokens(logits[:, 0], generator)
                if position == 0:
                    part_varied = max(0, min(len(next_ids), batch_varied - part.start))
                    next_ids[:part_varied] = batch[part, 1][:part_varied]
                batch[part, position + 1] = next_ids
    return tokens


def _record(hidden: Sequence[Tensor], position: int, index: int, x: Tensor) -> None:
    """Write the hidden states `x` `[B, 1, H]` of one position, unless `hidden` is empty."""
    if hidden:
        hidden[index][:, position : position + 1] = x


def sample_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one token for each row of logits `[n, V]` at temperature 1; returns int64 `[n]`.

    Inverse transform sampling: one random number per token, from a generator on the CPU.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    points = points.to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points).squeeze(1).clamp(max=logits.shape[-1] - 1)
