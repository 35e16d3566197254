"""End-to-end self-distillation: the quantized model learns to say what the float one says.

Teacher: the float32 checkpoint. Text: written by the teacher. Loss: KL(teacher || student) at
every token (Hinton et al. 2015), which is the very number that a plan is judged by. What learns
are the places of weights on their grids, scales, zero points, norm gains and filters; widths,
groups and bytes stay as planned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from lfmc.calib_free.fit.student import Student
from lfmc.calib_free.fit.training_loop import Course, Terms, follow
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.fitted_tensors import Parts
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.model import Decoder, initial_state
from lfmc.parity.text_quality import logits_of


def distill(
    checkpoint: Checkpoint, plan: BitPlan, texts: Tensor, terms: Terms, course: Course
) -> dict[str, Parts]:
    """Fitted tensors of a plan, learned end to end on `texts` `[N, T]` int64, where those are.

    Where nothing ends it early, the same arguments give the same result on the same machine.
    """
    teacher = checkpoint.decoder().to(texts.device)
    student = Student(checkpoint, plan).to(texts.device)

    def loss(numbers: Tensor) -> Tensor:
        return _loss(teacher, student, texts[numbers.to(texts.device)])

    follow(student, course, len(texts), loss, terms, "end to end")
    return student.parts()


def _loss(teacher: Decoder, student: Student, tokens: Tensor) -> Tensor:
    """Mean KL(teacher || student) over all tokens `[B, T]`, with gradients for the student."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    with torch.no_grad():
        wanted = next(logits_of(teacher, tokens, len(tokens)))
    states = initial_state(teacher.config, len(tokens), tokens.shape[1], tokens.device)
    logits, _ = functional_call(teacher, student(), (tokens, positions, states))
    return kl(wanted, logits)


def kl(wanted: Tensor, logits: Tensor) -> Tensor:
    """Mean KL of logits `[..., V]` from `wanted` `[..., V]`, in nats."""
    ours, theirs = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()
