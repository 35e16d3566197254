"""Block-wise self-distillation: each block learns to give what its float form gave.

A block's student reads the hidden states of the blocks before it as they were stored, so it also
makes up for their errors; its teacher reads those of the float model. Both are the model's own text
pushed through it. An error in a channel of the residual stream costs what the Fisher information
says (in nats, half the mean squared gradient of the log-likelihood), so the loss of a block speaks
of KL and not of whichever channel is the largest. Memory: one block's weights as they learn, and
the hidden states of all texts twice.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from lfmc.calib_free.auto.sensitivity import channel_worth
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit.blocks import Block, embed, push
from lfmc.calib_free.fit.student import BYTES_PER_PARAM, Student
from lfmc.calib_free.fit.training_loop import Course, Terms, fast_products, follow
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.fitted_tensors import Parts
from lfmc.calib_free.plan.planned_tensors import dequantized_weights
from lfmc.checkpoint.checkpoint import Checkpoint

FLOAT32 = 4  # bytes
MOMENTS = 32  # texts whose gradients say what a channel is worth
HIDDEN_TIMES = 3  # hidden states of all texts: wanted, given, and those being made


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
    stream = StreamedDecoder(checkpoint, str(texts.device))
    worth = channel_worth(stream, texts[:MOMENTS], terms.seed, terms.progress)
    del stream
    wanted = embed(texts, checkpoint.weights)
    given = embed(texts, dequantized_weights(checkpoint, plan))
    fitted: dict[str, Parts] = {}
    began = time.monotonic()
    for index in range(layers):
        block = Block(checkpoint, index, texts.device)
        wanted = _push(block, wanted)
        student = Student(checkpoint, plan, block.names).to(texts.device)
        own = terms
        if terms.ends is not None:
            share = (index + 1) / layers
            own = replace(terms, ends=started + share * (terms.ends - started))
        title = f"block {index + 1} of {layers}{_left(time.monotonic() - began, index, layers)}"
        _learn(block, student, course, (given, wanted), worth[index], own, title)
        given = _push(block, given, student)
        fitted |= student.parts()
    return fitted


def block_nbytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Memory that `fit_blocks` takes at most, to learn from so many tokens."""
    sizes: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = name.removeprefix("model.layers.").split(".")[0] if ".layers." in name else "ends"
        sizes[layer] = sizes.get(layer, 0) + info.numel
    hidden = FLOAT32 * tokens * checkpoint.config.hidden_size
    return BYTES_PER_PARAM * max(sizes.values()) + HIDDEN_TIMES * hidden


def _learn(
    block: Block,
    student: Student,
    course: Course,
    hidden: tuple[Tensor, Tensor],
    worth: Tensor,
    terms: Terms,
    title: str,
) -> None:
    """Train one block's student: from and to `hidden` `[N, T, H]`, channels weighed by `[H]`."""
    given, wanted = hidden

    def loss(numbers: Tensor) -> Tensor:
        numbers = numbers.to(given.device)
        wrong = block(given[numbers], student()) - wanted[numbers]
        mean: Tensor = 0.5 * (wrong.square() * worth).sum(-1).mean()
        return mean

    follow(student, course, len(given), loss, terms, title)


def _left(seconds: float, done: int, count: int) -> str:
    """What to tell of the time that `count` blocks need, after `seconds` for those `done`."""
    if not done:
        return ""
    return f", about {math.ceil(seconds / done * (count - done) / 60)} min left"


def _push(block: Block, hidden: Tensor, student: Student | None = None) -> Tensor:
    """All hidden states `[N, T, H]` through a block, as it is or as a student has it."""
    with torch.no_grad(), fast_products(hidden.device):
        return push(block, hidden, None if student is None else student())
