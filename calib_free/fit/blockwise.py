"""Block-wise self-distillation: train each quantized block to match its float block.

The student of a block reads the outputs of the quantized blocks before it, so it also corrects
their errors. The teacher reads the outputs of the float blocks. The inputs are text sampled from
the model. The loss weights the squared error of each channel of the residual stream by its Fisher
information (in nats, half the mean squared gradient of the log-likelihood), so it approximates KL
and is not dominated by the largest channel. Memory: the weights of one block in training, and the
hidden states of all texts twice.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from lfmc.calib_free.auto.sensitivity import channel_information
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit.blocks import Block, embed, run_block
from lfmc.calib_free.fit.student import BYTES_PER_PARAM, Student
from lfmc.calib_free.fit.training_loop import TrainingOptions, TrainingSchedule, fast_matmuls, train
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.fitted_tensors import Parts
from lfmc.calib_free.plan.planned_tensors import dequantized_weights
from lfmc.checkpoint.checkpoint import Checkpoint

FISHER_TEXTS = 32  # texts that the Fisher information of channels is computed on
HIDDEN_COPIES = 3  # of all texts: the teacher's, the student's, and those that a block computes


def fit_blocks(
    checkpoint: Checkpoint,
    plan: BitPlan,
    texts: Tensor,
    options: TrainingOptions,
    schedule: TrainingSchedule,
) -> dict[str, Parts]:
    """Fit the tensors of every layer on `texts` `[N, T]` int64, on the device of `texts`.

    `schedule.steps` is the number of steps for each block. If `options` has a deadline, the blocks
    share the remaining time. The embedding, the last norm and the head stay as planned, because no
    block contains them.
    """
    start = time.monotonic()
    layers = checkpoint.config.num_layers
    stream = StreamedDecoder(checkpoint, str(texts.device))
    information = channel_information(stream, texts[:FISHER_TEXTS], options.seed, options.progress)
    del stream
    teacher_hidden = embed(texts, checkpoint.weights)
    student_hidden = embed(texts, dequantized_weights(checkpoint, plan))
    fitted: dict[str, Parts] = {}
    blocks_start = time.monotonic()
    for index in range(layers):
        block = Block(checkpoint, index, texts.device)
        teacher_hidden = _run(block, teacher_hidden)
        student = Student(checkpoint, plan, block.names).to(texts.device)
        block_options = options
        if options.deadline is not None:
            share = (index + 1) / layers
            deadline = start + share * (options.deadline - start)
            block_options = replace(options, deadline=deadline)
        eta = _remaining_time(time.monotonic() - blocks_start, index, layers)
        title = f"block {index + 1} of {layers}{eta}"
        hidden = student_hidden, teacher_hidden
        _train_block(block, student, schedule, hidden, information[index], block_options, title)
        student_hidden = _run(block, student_hidden, student)
        fitted |= student.parts()
    return fitted


def block_nbytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Return the peak memory of `fit_blocks` in bytes, for texts of `tokens` tokens in total."""
    sizes: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = name.removeprefix("model.layers.").split(".")[0] if ".layers." in name else "none"
        sizes[layer] = sizes.get(layer, 0) + info.numel
    hidden = torch.float32.itemsize * tokens * checkpoint.config.hidden_size
    return BYTES_PER_PARAM * max(sizes.values()) + HIDDEN_COPIES * hidden


def _train_block(
    block: Block,
    student: Student,
    schedule: TrainingSchedule,
    hidden: tuple[Tensor, Tensor],
    information: Tensor,
    options: TrainingOptions,
    title: str,
) -> None:
    """Train the student of one block.

    `hidden` are the student's inputs and the teacher's outputs, `[N, T, H]` each. `information`
    `[H]` weights the channels.
    """
    inputs, targets = hidden

    def loss(indices: Tensor) -> Tensor:
        indices = indices.to(inputs.device)
        error = block(inputs[indices], student()) - targets[indices]
        mean: Tensor = 0.5 * (error.square() * information).sum(-1).mean()
        return mean

    train(student, schedule, len(inputs), loss, options, title)


def _remaining_time(seconds: float, done: int, count: int) -> str:
    """Format the time that `count` blocks still need, if the first `done` took `seconds`."""
    if not done:
        return ""
    return f", about {math.ceil(seconds / done * (count - done) / 60)} min left"


def _run(block: Block, hidden: Tensor, student: Student | None = None) -> Tensor:
    """Run a block on all hidden states `[N, T, H]`, with its float weights or a student's."""
    with torch.no_grad(), fast_matmuls(hidden.device):
        return run_block(block, hidden, None if student is None else student())
