"""How much the model's output changes with each weight: the diagonal of the Fisher information.

For a small change `d` of the weights, KL(model || changed) = 1/2 d' F d. Rounding errors are close
to independent with mean zero, so only the diagonal of F counts in expectation:
`KL = 1/2 sum F_ij d_ij^2`, with one unit (nats per token) for every tensor of every layer.

F is the mean squared gradient of the log-likelihood of labels drawn *from the model*: the true
Fisher, not the "empirical" one of given labels (Kunstner et al. 2019, section 3). Gradients of
different labels are uncorrelated (each has mean zero given what came before), so the square of one
text's whole gradient is an unbiased sample of the sum over its tokens.

A text's gradient of a matrix `[N, K]` is `G' X`, with its inputs `X [T, K]` and the gradients
`G [T, N]` of its outputs. The whole square is never needed:

    sum_i (G'X)_ij^2 = sum_t X_tj ((G G') X)_tj            (what an error in column j costs)
    (G'X)_ij^2 for some rows i                             (what to weigh errors of a few rows by)

so one layer's weights, and its inputs and gradients, are all that is in memory beside the hidden
states between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfmc.calib_free.auto.sampled_text import choose
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.plan.roles import EMBEDDING, HEAD

ROWS = 128  # of every matrix, by their share of the information


@dataclass(frozen=True)
class Sensitivity:
    """The Fisher information of a matrix `[N, K]`, in nats per token and squared weight.

    `columns` float32 `[K]` are its sums over all rows; `information` float32 `[R, K]` is that of
    `rows` (int64 `[R]`, rising), times how many rows each of them stands for.
    """

    name: str
    columns: Tensor
    rows: Tensor
    information: Tensor


@dataclass(frozen=True)
class _Text:
    """What one text tells of a matrix: inputs `[n, K]`, and of output gradients `G [n, N]` the
    products `G G' [n, n]` and the picked columns `[n, R]`."""

    inputs: Tensor
    gram: Tensor
    picked: Tensor


@dataclass(frozen=True)
class _Head:
    """What the head's pass over the texts leaves behind, of `B` texts of `T` tokens.

    `inputs` `[B, T, H]`; of `G`, the gradients of the logits: `G G'` `[B, T, T]`, its columns of
    the text's own tokens `[B, T, T]`, and what each of its `[V]` columns may weigh.
    `norms` `[B, T, 1]` are the logarithms of the softmax's denominators.
    """

    inputs: Tensor
    labels: Tensor
    norms: Tensor
    gram: Tensor
    own: Tensor
    total: Tensor


@torch.no_grad()
def sensitivities(
    decoder: StreamedDecoder, tokens: Tensor, seed: int, progress: Callable[[str], None]
) -> Iterator[Sensitivity]:
    """Sensitivities of every quantizable matrix, last layer first.

    `tokens` `[B, T]`, int64, are what the model reads; what it predicts is drawn anew at every
    position, with `seed`. Memory: hidden states float32 `[B, T, H]` between all layers, and one
    layer's inputs and gradients.
    """
    layers = decoder.config.num_layers
    hidden = _forward(decoder, tokens, progress)
    progress("sensitivity: head")
    head, gradient = _run_head(decoder, tokens, hidden.pop(), seed)
    for index in reversed(range(layers)):
        progress(f"sensitivity: backward, layer {index + 1} of {layers}")
        found: list[Sensitivity] = []

        def observe(
            name: str, x: Tensor, g: Tensor, rows: Tensor, found: list[Sensitivity] = found
        ) -> None:
            found.append(_of_matrix(name, x, g, rows // tokens.shape[1], tokens.numel()))

        gradient = decoder.layer_backward(index, hidden.pop(), gradient, observe)
        yield from found
    yield from _of_vocabulary(decoder, tokens, head, gradient)


@torch.no_grad()
def channel_worth(
    decoder: StreamedDecoder, tokens: Tensor, seed: int, progress: Callable[[str], None]
) -> list[Tensor]:
    """What a squared error in each channel behind each layer costs: float32 `[H]` a layer.

    The diagonal of the Fisher information of the hidden state: the mean over `tokens` `[B, T]` of
    its squared gradient, in nats per token.
    """
    hidden = _forward(decoder, tokens, progress)
    _, gradient = _run_head(decoder, tokens, hidden.pop(), seed)
    worth: list[Tensor] = []
    for index in reversed(range(decoder.config.num_layers)):
        progress(f"what channels are worth: backward, layer {index + 1}")
        worth.append(gradient.square().mean((0, 1)))
        gradient = decoder.layer_backward(index, hidden.pop(), gradient)
    return worth[::-1]


def _forward(
    decoder: StreamedDecoder, tokens: Tensor, progress: Callable[[str], None]
) -> list[Tensor]:
    """Hidden states `[B, T, H]` in front of the first layer and behind each."""
    layers = decoder.config.num_layers
    hidden = [decoder.embed(tokens)]
    for index in range(layers):
        progress(f"sensitivity: forward, layer {index + 1} of {layers}")
        hidden.append(decoder.layer(index, hidden[-1]))
    return hidden


def column_importance(columns: Tensor) -> Tensor:
    """Importance of each input channel `[K]` of a matrix: its share of the information.

    A hundredth of the mean is added, because a sample never saw every channel at work.
    """
    return columns + 0.01 * columns.mean()


def pick_rows(total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` of N rows, int64 `[R]`, and how many rows each stands for, float32 `[R]`.

    Evenly spaced along the running sum of `total` `[N]` (systematic sampling in proportion to
    size), of which a tenth is spread over all rows: sums over the sample are unbiased for any
    order of rows, up to the spacing's start.
    """
    if len(total) <= count:
        return torch.arange(len(total)), torch.ones(len(total))
    wide = total.double()
    shares = wide + 0.1 * wide.mean() + 1e-300
    shares = shares / shares.sum()
    points = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = torch.searchsorted(shares.cumsum(0), points).clamp(max=len(total) - 1)
    rows, times = drawn.unique(return_counts=True)
    return rows, (times / (count * shares[rows])).float()


def _of_matrix(name: str, x: Tensor, g: Tensor, texts: Tensor, count: int) -> Sensitivity:
    """The sensitivity of a matrix with inputs `[n, K]`, output gradients `[n, N]`, of `texts`."""
    x = x.float()
    rows, weights = pick_rows(x.square().sum(1) @ g.square(), ROWS)
    sizes = texts.unique_consecutive(return_counts=True)[1].tolist()
    picked = g[:, rows].split(sizes)
    parts = zip(x.split(sizes), g.split(sizes), picked, strict=True)
    seen = [_Text(inputs, own @ own.T, some) for inputs, own, some in parts]
    return _sum(name, seen, rows, weights, x.shape[1], count)


def _sum(
    name: str, texts: Sequence[_Text], rows: Tensor, weights: Tensor, width: int, count: int
) -> Sensitivity:
    columns, information = torch.zeros(width), torch.zeros(len(rows), width)
    for text in texts:
        columns += (text.inputs * (text.gram @ text.inputs)).sum(0)
        information += (text.picked.T @ text.inputs).square_()
    information *= weights.unsqueeze(1)
    return Sensitivity(name, columns.clamp_(min=0) / count, rows, information / count)


def _run_head(
    decoder: StreamedDecoder, tokens: Tensor, last: Tensor, seed: int
) -> tuple[_Head, Tensor]:
    """The head's part, and the gradient of the last layer's output `last`, both `[B, T, H]`."""
    count, length = tokens.shape
    inputs = decoder.normalized(last)
    generator = torch.Generator().manual_seed(seed)
    head = _Head(
        inputs,
        torch.empty_like(tokens),
        inputs.new_empty(count, length, 1),
        inputs.new_empty(count, length, length),
        inputs.new_empty(count, length, length),
        inputs.new_zeros(decoder.config.vocab_size),
    )
    back = torch.empty_like(inputs)
    for part, logits, matrix in decoder.logits(inputs):
        head.norms[part] = logits.logsumexp(-1, keepdim=True)
        head.labels[part] = choose(logits.flatten(0, 1), generator).view(-1, length)
        g = logits.sub_(head.norms[part]).exp_()
        g.scatter_add_(2, head.labels[part].unsqueeze(2), -g.new_ones(len(g), length, 1))
        back[part] = (g.to(matrix.dtype) @ matrix).float()
        head.gram[part] = g @ g.transpose(1, 2)
        head.own[part] = g.gather(2, tokens[part].unsqueeze(1).expand(-1, length, -1))
        energy = inputs[part].square().sum(-1).flatten()
        head.total.add_(energy @ g.square_().flatten(0, 1))
    with torch.enable_grad():
        x = last.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(decoder.normalized(x), x, back)
    return head, gradient


def _of_vocabulary(
    decoder: StreamedDecoder, tokens: Tensor, head: _Head, gradient: Tensor
) -> Iterator[Sensitivity]:
    """Sensitivities of the lookup and of the head; of a tied embedding, which is both, one.

    The lookup is a product with one-hot rows, so a text's gradient of a tied embedding is
    `[G, O]' [X, D]`, with one-hot tokens `O [T, V]` and the lookup's gradients `D [T, H]`.
    """
    size, width = decoder.config.vocab_size, gradient.shape[-1]
    looked_up = torch.zeros(size)
    looked_up.index_add_(0, tokens.flatten(), gradient.square().sum(-1).flatten())
    same = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).float()  # O O', (B, T, T)
    if decoder.config.tied_embedding:
        rows, weights = pick_rows(head.total + looked_up, ROWS)
        picked = torch.cat([_head_gradients(decoder, head, rows), _hot(tokens, rows)], 1)
        across = torch.cat([head.own.transpose(1, 2), same], 2)
        gram = torch.cat([torch.cat([head.gram, head.own], 2), across], 1)
        inputs = torch.cat([head.inputs, gradient], 1)
        texts = [_Text(*parts) for parts in zip(inputs, gram, picked, strict=True)]
        yield _sum(EMBEDDING, texts, rows, weights, width, tokens.numel())
        return
    rows, weights = pick_rows(head.total, ROWS)
    picked = _head_gradients(decoder, head, rows)
    texts = [_Text(*parts) for parts in zip(head.inputs, head.gram, picked, strict=True)]
    yield _sum(HEAD, texts, rows, weights, width, tokens.numel())
    rows, weights = pick_rows(looked_up, ROWS)
    texts = [_Text(*parts) for parts in zip(gradient, same, _hot(tokens, rows), strict=True)]
    yield _sum(EMBEDDING, texts, rows, weights, width, tokens.numel())


def _head_gradients(decoder: StreamedDecoder, head: _Head, rows: Tensor) -> Tensor:
    """Columns `rows` of the gradients of the logits, float32 `[B, T, R]`, made again."""
    logits = head.inputs @ decoder.head_rows(rows).T
    return (logits - head.norms).exp_() - _hot(head.labels, rows)


def _hot(tokens: Tensor, rows: Tensor) -> Tensor:
    """Float32 `[B, T, R]`: 1 where a token is the row's."""
    return (tokens.unsqueeze(2) == rows).float()
