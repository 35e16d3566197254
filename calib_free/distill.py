"""End-to-end self-distillation: the quantized model learns to say what the float one says.

Teacher: the float32 checkpoint. Text: written by the teacher. Loss: KL(teacher || student) at
every token (Hinton et al. 2015), which is the very number that a plan is judged by. What learns
are the places of weights on their grids, scales, zero points, norm gains and filters; widths,
groups and bytes stay as planned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from lfmc.calib_free.fitted import Parts
from lfmc.calib_free.plan import BitPlan
from lfmc.calib_free.sample import logits_of, sample
from lfmc.calib_free.student import Student
from lfmc.checkpoint import Checkpoint
from lfmc.model import Decoder, initial_state

# float32: teacher; latent weight, its gradient and Adam's two moments; the weight that is stored,
# and its gradient.
BYTES_PER_PARAM = 28
WARM_UP = 0.05  # of all steps
HELD_OUT = 16  # texts that nothing learns from
PACE_STEPS = 3  # after these the steps that fit into the minutes are known


@dataclass(frozen=True)
class Course:
    """How much is learned: `steps` of `batch` texts of `length` tokens, out of `texts` texts."""

    steps: int
    batch: int
    texts: int
    length: int


@dataclass(frozen=True)
class Distilled:
    """Fitted tensors, and the KL on held-out text of the model's own before and after, in nats."""

    fitted: dict[str, Parts]
    kl_before: float
    kl_after: float
    steps: int


def distill(
    checkpoint: Checkpoint,
    plan: BitPlan,
    course: Course,
    *,
    seed: int,
    device: str,
    seconds: float | None,
    progress: Callable[[str], None],
) -> Distilled:
    """Fit what a plan stores to the checkpoint, end to end, on `device`.

    `seconds` bounds the whole of it: fewer steps are taken where they would not all fit. Without
    it the same arguments give the same result on the same machine.
    """
    started = time.monotonic()
    teacher = checkpoint.decoder().to(device)
    progress(f"sampling {course.texts} texts from the model")
    texts = sample(teacher, course.texts + HELD_OUT, course.length, seed, course.texts // 2)
    held_out = texts[course.texts :]
    student = Student(checkpoint, plan).to(device)
    before = held_out_kl(teacher, student, held_out)
    optimizer = student.optimizer()
    steps, step, slowest = course.steps, 0, 0.0
    while step < steps:
        tick = time.monotonic()
        rate = schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["highest"]
        with fast_products(device):
            loss = _loss(teacher, student, texts[_batch(course, seed, step).to(texts.device)])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
        step += 1
        progress(f"learning: step {step} of {steps}, KL {float(loss.detach()):.4f}")
        if seconds is not None and step <= PACE_STEPS:
            slowest = max(slowest, time.monotonic() - tick) if step > 1 else 0.0
            if step == PACE_STEPS:
                left = seconds - (time.monotonic() - started)
                steps = min(steps, step + max(0, int(left / slowest)))
    after = held_out_kl(teacher, student, held_out)
    return Distilled(student.parts(), before, after, steps)


@contextmanager
def fast_products(device: str) -> Iterator[None]:
    """Matrix products of bfloat16 (CPU) or TF32 (CUDA) inputs with float32 sums, meanwhile.

    Twice as fast where the CPU has such instructions; teacher and student round alike, and what
    is left is far below what 4 bits do. Whatever is measured is measured outside of this.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if device == "cpu" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def schedule(step: int, steps: int) -> float:
    """The share of the highest rate at a step: a short warm-up, then half a cosine to zero."""
    warm = (step + 1) / max(1.0, WARM_UP * steps)
    return min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batch(course: Course, seed: int, step: int) -> Tensor:
    """Numbers of the texts of a step, int64 `[batch]`: every text once, then again."""
    per_round = max(1, course.texts // course.batch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_round)
    order = torch.randperm(course.texts, generator=generator)
    first = step % per_round * course.batch
    return order[first : first + course.batch]


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


@torch.no_grad()
def held_out_kl(teacher: Decoder, student: Student, texts: Tensor) -> float:
    """KL of the student as it would be stored, on texts `[N, T]`, in nats per token."""
    parts = [float(_loss(teacher, student, text)) * len(text) for text in texts.split(8)]
    return sum(parts) / len(texts)
