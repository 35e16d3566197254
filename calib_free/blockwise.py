"""Block-wise self-distillation: each block learns to give what its float form gave.

A block's student reads the hidden states of the blocks before it as they were stored, so it also
makes up for their errors; its teacher reads those of the float model. Both are the model's own text
pushed through it. An error in a channel of the residual stream costs what the Fisher information
says (in nats, half the mean squared gradient of the log-likelihood), so the loss of a block speaks
of KL and not of whichever channel is the largest. Memory: one block's weights as they learn, and
the hidden states of all texts twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.calib_free.blocks import BATCH, Block, Stored, embed, head, push
from lfmc.calib_free.fitted import Parts
from lfmc.calib_free.plan import BitPlan, dequantized_weights
from lfmc.calib_free.student import Student
from lfmc.calib_free.training import Course, Terms, fast_products, follow
from lfmc.checkpoint import Checkpoint

MOMENTS = 32  # texts whose gradients say what a channel is worth


def fit_blocks(
    checkpoint: Checkpoint,
    plan: BitPlan,
    texts: Tensor,
    terms: Terms,
    course: Course,
) -> dict[str, Parts]:
    """Fitted tensors of every layer; `texts` `[N, T]` int64 say where (on which device) to learn.

    `course.steps` is a number of steps a block; what `terms` leave of time is shared by all. The
    embedding, the last norm and the head stay as planned: they are not the work of a block.
    """
    started = time.monotonic()
    layers = checkpoint.config.num_layers
    worth = channel_worth(checkpoint, texts[:MOMENTS], terms.seed, terms.progress)
    wanted = embed(texts, Stored(checkpoint))
    given = embed(texts, dequantized_weights(checkpoint, plan))
    fitted: dict[str, Parts] = {}
    for index in range(layers):
        block = Block(checkpoint, index, texts.device)
        wanted = _push(block, wanted)
        student = Student(checkpoint, plan, block.names).to(texts.device)
        own = terms
        if terms.ends is not None:
            share = (index + 1) / layers
            own = replace(terms, ends=started + share * (terms.ends - started))
        _learn(block, student, course, (given, wanted), worth[index], own)
        given = _push(block, given, student)
        fitted |= student.parts()
    return fitted


def _learn(
    block: Block,
    student: Student,
    course: Course,
    hidden: tuple[Tensor, Tensor],
    worth: Tensor,
    terms: Terms,
) -> None:
    """Train one block's student: from and to `hidden` `[N, T, H]`, channels weighed by `[H]`."""
    given, wanted = hidden

    def loss(numbers: Tensor) -> Tensor:
        numbers = numbers.to(given.device)
        wrong = block(given[numbers], student()) - wanted[numbers]
        mean: Tensor = 0.5 * (wrong.square() * worth).sum(-1).mean()
        return mean

    follow(student, course, len(given), loss, terms, f"block {block.index + 1}")


def _push(block: Block, hidden: Tensor, student: Student | None = None) -> Tensor:
    """All hidden states `[N, T, H]` through a block, as it is or as a student has it."""
    with torch.no_grad(), fast_products(hidden.device):
        return push(block, hidden, None if student is None else student())


def channel_worth(
    checkpoint: Checkpoint, texts: Tensor, seed: int, progress: Callable[[str], None]
) -> list[Tensor]:
    """What a squared error in each channel behind each layer costs: float32 `[H]` a layer.

    The mean over tokens of the squared gradient of the log-likelihood of a label that the model
    draws itself: the diagonal of the Fisher information of the hidden state. One pass up, which
    keeps what goes into every block, and one pass down.
    """
    inputs = [embed(texts, Stored(checkpoint))]
    for index in range(checkpoint.config.num_layers):
        progress(f"what channels are worth: up, block {index + 1}")
        inputs.append(_push(Block(checkpoint, index, texts.device), inputs[-1]))
    generator = torch.Generator(texts.device).manual_seed(seed)
    top = [_head_gradient(checkpoint, part, generator) for part in inputs.pop().split(BATCH)]
    grad = torch.cat(top)
    worth: list[Tensor] = []
    for index in reversed(range(checkpoint.config.num_layers)):
        progress(f"what channels are worth: down, block {index + 1}")
        worth.append(grad.square().mean((0, 1)))
        block, below = Block(checkpoint, index, texts.device), inputs.pop()
        pieces = zip(below.split(BATCH), grad.split(BATCH), strict=True)
        grad = torch.cat([_down(block, part, above) for part, above in pieces])
    return worth[::-1]


def _down(block: Block, hidden: Tensor, grad: Tensor) -> Tensor:
    """The gradient in front of a block from the one behind it, `[B, T, H]`."""
    hidden = hidden.detach().requires_grad_(True)
    with fast_products(hidden.device):
        (found,) = torch.autograd.grad(block(hidden), hidden, grad)
    return found


def _head_gradient(checkpoint: Checkpoint, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient `[B, T, H]` of each token's own loss at a label drawn from the model."""
    hidden = hidden.detach().requires_grad_(True)
    logits = head(checkpoint.config, hidden, Stored(checkpoint)).flatten(0, 1)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    (found,) = torch.autograd.grad(loss, hidden)
    return found
