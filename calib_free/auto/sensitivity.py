"""Sensitivity of the model's output to each weight: the diagonal of the Fisher information.

For a small change `d` of the weights, KL(model || changed) = 1/2 d' F d. Rounding errors are close
to independent with mean zero, so only the diagonal of F contributes in expectation:
`KL = 1/2 sum F_ij d_ij^2`, in the same unit (nats per token) for every tensor of every layer.

F is the mean squared gradient of the log-likelihood of labels drawn *from the model*: the true
Fisher, not the "empirical" one of given labels (Kunstner et al. 2019, section 3). Gradients of
different labels are uncorrelated (each has mean zero given earlier tokens), so the square of one
text's whole gradient is an unbiased sample of the sum over its tokens.

One text's gradient of a matrix `[N, K]` is `G' X`, with the matrix's inputs `X [T, K]` and the
gradients `G [T, N]` of its outputs. The square is never computed in full, only

    sum_i (G'X)_ij^2 = sum_t X_tj ((G G') X)_tj            (the cost of an error in column j)
    (G'X)_ij^2 for some rows i                             (the weight of each error in these rows)

so memory contains the weights, inputs and gradients of one layer, and the hidden states between
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lfmc.calib_free.auto.sampled_text import sample_tokens
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.plan.roles import EMBEDDING, HEAD
from lfmc.machine.cache import NOT_STORED, Intermediate

ROWS = 128  # sampled from every matrix in proportion to their information


@dataclass(frozen=True)
class Sensitivity:
    """The Fisher information of a matrix `[N, K]`, in nats per token and squared weight.

    `columns` float32 `[K]` are the sums over all rows. `information` float32 `[R, K]` is the
    information of `rows` (int64 `[R]`, ascending), times the number of rows that each row
    represents.
    """

    name: str
    columns: Tensor
    rows: Tensor
    information: Tensor


@dataclass(frozen=True)
class _Text:
    """The inputs and output gradients of a matrix on one text.

    `inputs` are `[n, K]`. With the output gradients `G` `[n, N]`, `gram` is `G G'` `[n, n]`, and
    `row_gradients` `[n, R]` are the columns of `G` that belong to the sampled rows.
    """

    inputs: Tensor
    gram: Tensor
    row_gradients: Tensor


@dataclass(frozen=True)
class _Head:
    """Results of the head's pass over `B` texts of `T` tokens.

    `inputs` `[B, T, H]` are the head's inputs and `labels` `[B, T]` the sampled labels. With `G`,
    the gradients of the logits: `gram` is `G G'` `[B, T, T]`, `token_gradients` `[B, T, T]` are the
    columns of `G` that belong to the text's tokens, and `total` `[V]` bounds the information of
    each column. `norms` `[B, T, 1]` are the logarithms of the softmax denominators.
    """

    inputs: Tensor
    labels: Tensor
    norms: Tensor
    gram: Tensor
    token_gradients: Tensor
    total: Tensor


@torch.no_grad()
def compute_sensitivities(
    decoder: StreamedDecoder,
    tokens: Tensor,
    seed: int,
    progress: Callable[[str], None],
    *,
    hidden: Sequence[Tensor] = (),
    stored: Intermediate = NOT_STORED,
    count: int | None = None,
) -> Iterator[list[Sensitivity]]:
    """Yield the sensitivities of all quantizable matrices of a layer, last layer first.

    The last list contains the embedding and the head. `tokens` `[B, T]`, int64, are the model's
    inputs. `hidden` are their hidden states `[B, T, H]` before the first layer and after each
    layer, if they are known. Labels are sampled from the model at every position, with `seed`.
    Memory: hidden states float32 `[B, T, H]` between all layers, and one layer's inputs and
    gradients. `stored` receives the hidden states and gradients between layers. A later call with
    the same arguments continues from them: it yields the first `count` layers (None: all layers),
    if the gradient above these layers is stored, else all layers.
    """
    layers = decoder.config.num_layers
    hidden = list(hidden) or _hidden_states(decoder, tokens, progress, stored)
    count = layers if count is None else count
    head, gradient = _load_head(stored), stored.load(_gradient_name(count))
    if head is not None and gradient is not None:
        output_gradient = gradient["gradient"]
        del hidden[count:]
    else:
        progress("sensitivity: head")
        head, output_gradient = _run_head(decoder, tokens, hidden.pop(), seed)
        stored.save("head", {field.name: getattr(head, field.name) for field in fields(head)})
        stored.save(_gradient_name(layers), {"gradient": output_gradient})
        count = layers
    for index in reversed(range(count)):
        progress(f"sensitivity: backward, layer {index + 1} of {count}")
        sensitivities: list[Sensitivity] = []

        def observe(
            name: str,
            x: Tensor,
            g: Tensor,
            positions: Tensor,
            sensitivities: list[Sensitivity] = sensitivities,
        ) -> None:
            texts = positions // tokens.shape[1]
            sensitivities.append(_matrix_sensitivity(name, x, g, texts, tokens.numel()))

        output_gradient = decoder.layer_backward(index, hidden.pop(), output_gradient, observe)
        stored.save(_gradient_name(index), {"gradient": output_gradient})
        yield sensitivities
    yield list(_vocabulary_sensitivities(decoder, tokens, head, output_gradient))


@torch.no_grad()
def channel_information(
    decoder: StreamedDecoder, tokens: Tensor, seed: int, progress: Callable[[str], None]
) -> list[Tensor]:
    """Return, for each layer, the cost of a squared error in each output channel: float32 `[H]`.

    This is the diagonal of the Fisher information of the hidden state: its squared gradient,
    averaged over `tokens` `[B, T]`, in nats per token.
    """
    hidden = _hidden_states(decoder, tokens, progress)
    _, gradient = _run_head(decoder, tokens, hidden.pop(), seed)
    information: list[Tensor] = []
    for index in reversed(range(decoder.config.num_layers)):
        progress(f"channel sensitivity: backward, layer {index + 1}")
        information.append(gradient.square().mean((0, 1)))
        gradient = decoder.layer_backward(index, hidden.pop(), gradient)
    return information[::-1]


def _hidden_states(
    decoder: StreamedDecoder,
    tokens: Tensor,
    progress: Callable[[str], None],
    stored: Intermediate = NOT_STORED,
) -> list[Tensor]:
    """Return the hidden states `[B, T, H]` before the first layer and after each layer.

    Stored hidden states are read, and others are stored as soon as they are computed.
    """
    layers = decoder.config.num_layers
    hidden = [decoder.embed(tokens)]
    for index in range(layers):
        name = hidden_name(index + 1)
        if (tensors := stored.load(name)) is not None:
            hidden.append(tensors["hidden"].to(decoder.device))
            continue
        progress(f"sensitivity: forward, layer {index + 1} of {layers}")
        hidden.append(decoder.layer(index, hidden[-1]))
        stored.save(name, {"hidden": hidden[-1]})
    return hidden


def hidden_name(count: int) -> str:
    """Return the name under which the hidden states after `count` layers are stored."""
    return f"hidden-{count}"


def _gradient_name(count: int) -> str:
    """Return the name under which the gradient after `count` layers is stored."""
    return f"gradient-{count}"


def _load_head(stored: Intermediate) -> _Head | None:
    """Return the stored results of the head, or None."""
    tensors = stored.load("head")
    return None if tensors is None else _Head(**tensors)


def column_importance(columns: Tensor) -> Tensor:
    """Return the importance of each input channel `[K]` of a matrix.

    This is the information of its column, plus a hundredth of the mean because the sample may not
    activate every channel.
    """
    return columns + 0.01 * columns.mean()


def sample_rows(total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sample at most `count` of N rows in proportion to `total` `[N]`.

    Returns the rows, int64 `[R]`, and the number of rows that each represents, float32 `[R]`.
    Systematic sampling in proportion to size: points evenly spaced along the running sum of
    `total`, with a tenth of its mean added to every row. Sums over the sample are unbiased for any
    order of rows, up to the start of the spacing.
    """
    if len(total) <= count:
        return torch.arange(len(total)), torch.ones(len(total))
    sizes = total.double()
    shares = sizes + 0.1 * sizes.mean() + 1e-300
    shares = shares / shares.sum()
    points = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    draws = torch.searchsorted(shares.cumsum(0), points).clamp(max=len(total) - 1)
    rows, repeats = draws.unique(return_counts=True)
    return rows, (repeats / (count * shares[rows])).float()


def _matrix_sensitivity(name: str, x: Tensor, g: Tensor, texts: Tensor, count: int) -> Sensitivity:
    """Return the sensitivity of a matrix with inputs `x [n, K]` and output gradients `g [n, N]`.

    `texts` int64 `[n]` is the text of each position, ascending. `count` is the number of tokens.
    """
    x = x.float()
    rows, weights = sample_rows(x.square().sum(1) @ g.square(), ROWS)
    sizes = texts.unique_consecutive(return_counts=True)[1].tolist()
    row_gradients = g[:, rows].split(sizes)
    parts = zip(x.split(sizes), g.split(sizes), row_gradients, strict=True)
    contributions = [
        _Text(inputs, gradients @ gradients.T, of_rows) for inputs, gradients, of_rows in parts
    ]
    return _sum_texts(name, contributions, rows, weights, x.shape[1], count)


def _sum_texts(
    name: str, texts: Sequence[_Text], rows: Tensor, weights: Tensor, width: int, count: int
) -> Sensitivity:
    """Average the contributions of all texts over `count` tokens."""
    columns, information = torch.zeros(width), torch.zeros(len(rows), width)
    for text in texts:
        columns += (text.inputs * (text.gram @ text.inputs)).sum(0)
        information += (text.row_gradients.T @ text.inputs).square_()
    information *= weights.unsqueeze(1)
    return Sensitivity(name, columns.clamp_(min=0) / count, rows, information / count)


def _run_head(
    decoder: StreamedDecoder, tokens: Tensor, last: Tensor, seed: int
) -> tuple[_Head, Tensor]:
    """Run the head on the last layer's output `last` `[B, T, H]`.

    Returns the results of the head, and the gradient of `last` `[B, T, H]`.
    """
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
    input_gradient = torch.empty_like(inputs)
    for part, logits, matrix in decoder.logits(inputs):
        head.norms[part] = logits.logsumexp(-1, keepdim=True)
        head.labels[part] = sample_tokens(logits.flatten(0, 1), generator).view(-1, length)
        g = logits.sub_(head.norms[part]).exp_()
        g.scatter_add_(2, head.labels[part].unsqueeze(2), -g.new_ones(len(g), length, 1))
        input_gradient[part] = (g.to(matrix.dtype) @ matrix).float()
        head.gram[part] = g @ g.transpose(1, 2)
        head.token_gradients[part] = g.gather(2, tokens[part].unsqueeze(1).expand(-1, length, -1))
        energy = inputs[part].square().sum(-1).flatten()
        head.total.add_(energy @ g.square_().flatten(0, 1))
    with torch.enable_grad():
        x = last.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(decoder.normalized(x), x, input_gradient)
    return head, gradient


def _vocabulary_sensitivities(
    decoder: StreamedDecoder, tokens: Tensor, head: _Head, gradient: Tensor
) -> Iterator[Sensitivity]:
    """Yield the sensitivities of the head and of the embedding, or one if they are tied.

    The lookup is a product with one-hot rows, so one text's gradient of a tied embedding is
    `[G, O]' [X, D]`, with one-hot tokens `O [T, V]` and the lookup's gradients `D [T, H]`.
    """
    size, width = decoder.config.vocab_size, gradient.shape[-1]
    lookup_total = torch.zeros(size)
    lookup_total.index_add_(0, tokens.flatten(), gradient.square().sum(-1).flatten())
    one_hot_gram = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).float()  # O O', (B, T, T)
    if decoder.config.tied_embedding:
        rows, weights = sample_rows(head.total + lookup_total, ROWS)
        of_head, of_lookup = _head_gradients(decoder, head, rows), _one_hot(tokens, rows)
        row_gradients = torch.cat([of_head, of_lookup], 1)
        upper = torch.cat([head.gram, head.token_gradients], 2)
        lower = torch.cat([head.token_gradients.transpose(1, 2), one_hot_gram], 2)
        gram = torch.cat([upper, lower], 1)
        inputs = torch.cat([head.inputs, gradient], 1)
        texts = [_Text(*parts) for parts in zip(inputs, gram, row_gradients, strict=True)]
        yield _sum_texts(EMBEDDING, texts, rows, weights, width, tokens.numel())
        return
    rows, weights = sample_rows(head.total, ROWS)
    row_gradients = _head_gradients(decoder, head, rows)
    parts = zip(head.inputs, head.gram, row_gradients, strict=True)
    texts = [_Text(*text) for text in parts]
    yield _sum_texts(HEAD, texts, rows, weights, width, tokens.numel())
    rows, weights = sample_rows(lookup_total, ROWS)
    parts = zip(gradient, one_hot_gram, _one_hot(tokens, rows), strict=True)
    texts = [_Text(*text) for text in parts]
    yield _sum_texts(EMBEDDING, texts, rows, weights, width, tokens.numel())


def _head_gradients(decoder: StreamedDecoder, head: _Head, rows: Tensor) -> Tensor:
    """Recompute columns `rows` of the gradients of the logits, float32 `[B, T, R]`."""
    logits = head.inputs @ decoder.head_rows(rows).T
    return (logits - head.norms).exp_() - _one_hot(head.labels, rows)


def _one_hot(tokens: Tensor, rows: Tensor) -> Tensor:
    """Return float32 `[B, T, R]`: 1 where a token equals the row."""
    return (tokens.unsqueeze(2) == rows).float()
