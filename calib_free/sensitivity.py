"""How much the model's output changes with each weight: the diagonal of the Fisher information.

For a small change `d` of the weights, KL(model || changed) = 1/2 d' F d. Rounding errors are close
to independent with mean zero, so only the diagonal of F counts in expectation:
`KL = 1/2 sum F_ij d_ij^2`, with one unit (nats per token) for every tensor of every layer.

F is the mean squared gradient of the log-likelihood over text *from the model itself*: there the
gradients of different tokens are uncorrelated (each has mean zero given what came before), so the
square of one text's whole gradient is an unbiased sample of the sum over its tokens, and one
backward pass a text is enough. This is the true Fisher, not the "empirical" one of given labels
(Kunstner et al. 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.model import Decoder, initial_state

BYTES_PER_PARAM = 12  # float32 weights, Fisher information, and a gradient or a quantized copy


def fisher_diagonal(
    decoder: Decoder,
    names: Iterable[str],
    tokens: Tensor,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of each named parameter, float32 and shaped like it.

    `tokens` `[B, T]` must be sampled from `decoder` at temperature 1; the unit is nats per
    predicted token and squared weight. The decoder is left as it was.
    """
    parameters = dict(decoder.named_parameters())
    found = {name: torch.zeros_like(parameters[name]) for name in names}

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                found[name].addcmul_(parameter.grad, parameter.grad)
                parameter.grad = None

        return hook

    hooks = []
    for name in found:
        parameters[name].requires_grad_(True)
        parameter = parameters[name]
        hooks.append(parameter.register_post_accumulate_grad_hook(collect(name)))
    positions = torch.arange(tokens.shape[1])
    try:
        for index in range(len(tokens)):
            text = tokens[index : index + 1]
            states = initial_state(decoder.config, 1, tokens.shape[1])
            logits, _ = decoder(text, positions, states)
            loss = F.cross_entropy(logits[0, :-1], text[0, 1:], reduction="sum")
            torch.autograd.backward(loss)
            if progress is not None:
                progress(f"sensitivity: text {index + 1} of {len(tokens)}")
    finally:
        for hook, name in zip(hooks, found, strict=True):
            hook.remove()
            parameters[name].requires_grad_(False)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return {name: total.div_(predicted) for name, total in found.items()}


def column_importance(fisher: Tensor) -> Tensor:
    """Importance of each input channel `[K]` of a matrix `[N, K]`: its share of the information.

    A hundredth of the mean is added, because a sample never saw every channel at work.
    """
    columns = fisher.sum(0)
    return columns + 0.01 * columns.mean()
