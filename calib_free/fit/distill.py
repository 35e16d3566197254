"""End-to-end self-distillation: train the quantized model to match the float model's logits.

Teacher: the float32 checkpoint. Text: sampled from the teacher. Loss: KL(teacher || student) at
every token (Hinton et al. 2015), which is also the quality measure of a plan. Training changes the
positions of weights on their grids, scales, zero points, norm gains and filters. Bit widths, group
sizes and bytes stay as planned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from lfmc.calib_free.fit.student import Student
from lfmc.calib_free.fit.training_loop import TrainingOptions, TrainingSchedule, train
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.fitted_tensors import Parts
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.model import Decoder, initial_state
from lfmc.parity.text_quality import logits_of


def distill(
    checkpoint: Checkpoint,
    plan: BitPlan,
    texts: Tensor,
    options: TrainingOptions,
    schedule: TrainingSchedule,
) -> dict[str, Parts]:
    """Fit the tensors of a plan end to end on `texts` `[N, T]` int64, on the device of `texts`.

    Without a deadline, the result depends only on the arguments and the machine.
    """
    teacher = checkpoint.decoder().to(texts.device)
    student = Student(checkpoint, plan).to(texts.device)

    def loss(indices: Tensor) -> Tensor:
        return _loss(teacher, student, texts[indices.to(texts.device)])

    train(student, schedule, len(texts), loss, options, "end to end")
    return student.parts()


def _loss(teacher: Decoder, student: Student, tokens: Tensor) -> Tensor:
    """Return the mean KL(teacher || student) over all tokens `[B, T]`, to be differentiated."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    with torch.no_grad():
        expected = next(logits_of(teacher, tokens, len(tokens)))
    states = initial_state(teacher.config, len(tokens), tokens.shape[1], tokens.device)
    logits, _ = functional_call(teacher, student(), (tokens, positions, states))
    return kl(expected, logits)


def kl(expected: Tensor, logits: Tensor) -> Tensor:
    """Return the mean KL(expected || logits) in nats, both logits `[..., V]`."""
    log_q, log_p = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
